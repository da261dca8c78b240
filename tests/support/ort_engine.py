"""ONNX Runtime GenAI: greedy tokens and the loss on given tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import torch


class OrtGenAI:
    """An exported folder in ONNX Runtime GenAI, on one thread."""

    def __init__(self, folder: Path) -> None:
        config = og.Config(str(folder))
        config.overlay('{"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}')
        self._model = og.Model(config)

    def _generator(self, length: int, batch: int = 1) -> og.Generator:
        params = og.GeneratorParams(self._model)
        params.set_search_options(
            do_sample=False, max_length=length, min_length=length, batch_size=batch
        )
        return og.Generator(self._model, params)

    def greedy_tokens(self, prompt: list[int], count: int, chunk: int | None = None) -> list[int]:
        """Return the tokens after a prompt that is read whole, or in two parts."""
        generator = self._generator(len(prompt) + count)
        parts = [prompt] if chunk is None else [prompt[:chunk], prompt[chunk:]]
        for part in parts:
            generator.append_tokens(np.array([part], dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]

    def loss(self, tokens: list[int]) -> float:
        """Return the mean loss of tokens[1:], each given those before it, in nats."""
        logits = []
        generator = self._generator(len(tokens) + 1)
        for token in tokens[:-1]:
            generator.append_tokens(np.array([[token]], dtype=np.int32))
            logits.append(torch.from_numpy(np.array(generator.get_logits()).reshape(-1)))
        return float(
            torch.nn.functional.cross_entropy(
                torch.stack(logits).double(), torch.tensor(tokens[1:])
            )
        )
