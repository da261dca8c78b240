"""llama.cpp as PyPI's `xllamacpp` has it: greedy tokens and the loss on given tokens."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


class LlamaCpp:
    """A GGUF file in stock llama.cpp, on one thread.

    Args:
        path: The file.
        context: Tokens that the cache holds.
    """

    def __init__(self, path: Path, context: int = 256) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup = False
        # Its default is f16, which moves the logits more than the order of sums does.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(params)

    def complete(self, prompt: list[int] | str, count: int, **options: Any) -> dict[str, Any]:
        """Return the server's answer to a greedy completion."""
        request = {
            "prompt": prompt,
            "n_predict": count,
            "temperature": 0,
            "ignore_eos": True,
            "return_tokens": True,
            **options,
        }
        return self._post("completion", request)

    def _post(self, what: str, request: dict[str, Any]) -> dict[str, Any]:
        address = f"{self._server.listening_address}/{what}"
        headers = {"Content-Type": "application/json"}
        body = json.dumps(request).encode()
        with urllib.request.urlopen(urllib.request.Request(address, body, headers)) as answer:
            return dict(json.load(answer))

    def tokenize(self, text: str) -> list[int]:
        return list(self._post("tokenize", {"content": text})["tokens"])

    def greedy_tokens(self, prompt: list[int], count: int) -> list[int]:
        return list(self.complete(prompt, count, cache_prompt=False)["tokens"])

    def loss(self, tokens: list[int], vocabulary_size: int, start: int = 1) -> float:
        """Return the mean loss of tokens[start:], each given those before it, in nats."""
        total = 0.0
        # Probabilities are those before a bias. It makes the sampled token a whole letter: bytes
        # that are none yet are held back, and their probabilities with them.
        letter = self.tokenize("A")[0]
        options = {"n_probs": vocabulary_size, "logit_bias": [[letter, 1e4]], "cache_prompt": True}
        for position in range(start, len(tokens)):
            answer = self.complete(tokens[:position], 1, **options)
            likely = answer["completion_probabilities"][0]["top_logprobs"]
            total -= next(e["logprob"] for e in likely if e["id"] == tokens[position])
        return total / (len(tokens) - start)
