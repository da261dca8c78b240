"""Times of saved models in one engine, run by that engine's own environment.

    python benchmarks/_engines.py ENGINE --paths A B C --precision P ...   prints one JSON line

The models are loaded side by side and measured in rounds. `bench_engines.py` starts this program.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from ghosted_fast.measure.throughput import SpeedSettings, run_both_phases, throughputs_of
from ghosted_fast.timing.conditions import Watch


class Engine(Protocol):
    """One model, loaded."""

    def measure(self, prompt: list[int], new_tokens: int) -> tuple[float, float]:
        """Return the seconds of a prefill and of each of `new_tokens` decoding steps after it."""


class LlamaCpp:
    """A GGUF file in stock llama.cpp; the times are its own."""

    def __init__(self, path: Path, length: int, threads: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup = length + 8, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self._server = xllamacpp.Server(params)

    def measure(self, prompt: list[int], new_tokens: int) -> tuple[float, float]:
        request = {"prompt": prompt, "max_tokens": 1 + new_tokens, "temperature": 0,
                   "ignore_eos": True, "cache_prompt": False}  # fmt: skip
        answer: Any = self._server.handle_completions(request)
        timings = (answer if isinstance(answer, dict) else json.loads(answer))["timings"]
        if (timings["prompt_n"], timings["predicted_n"]) != (len(prompt), 1 + new_tokens):
            raise RuntimeError(f"llama.cpp read or wrote another number of tokens: {timings}")
        return timings["prompt_ms"] / 1e3, timings["predicted_ms"] / timings["predicted_n"] / 1e3


class OrtGenAI:
    """A folder in ONNX Runtime GenAI."""

    def __init__(self, path: Path, length: int, threads: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(path))
        session = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self._og, self._model = og, og.Model(config)

    def measure(self, prompt: list[int], new_tokens: int) -> tuple[float, float]:
        import numpy as np

        params = self._og.GeneratorParams(self._model)
        length = len(prompt) + 1 + new_tokens
        params.set_search_options(do_sample=False, min_length=length, max_length=length)
        generator = self._og.Generator(self._model, params)
        start = time.perf_counter()
        generator.append_tokens(np.array([prompt], dtype=np.int32))
        generator.generate_next_token()
        after_prefill = time.perf_counter()
        for _ in range(new_tokens):
            generator.generate_next_token()
        return after_prefill - start, (time.perf_counter() - after_prefill) / new_tokens


ENGINES: dict[str, Any] = {"llama.cpp": LlamaCpp, "ort-genai": OrtGenAI}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--paths", type=Path, nargs="+", required=True)
    parser.add_argument("--prompt-length", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--precision", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--vocabulary", type=int, required=True)
    given = parser.parse_args()
    import random

    draw = random.Random(0)
    prompt = [draw.randrange(given.vocabulary) for _ in range(given.prompt_length)]
    length = given.prompt_length + 1 + given.new_tokens
    engines: dict[str, Engine] = {
        path.name: ENGINES[given.engine](path, length, given.threads) for path in given.paths
    }
    settings = SpeedSettings(
        given.prompt_length, given.new_tokens, 1, given.precision, given.seconds
    )
    for engine in engines.values():
        engine.measure(prompt, given.new_tokens)
    watch = Watch()
    prefill, decode, ended = run_both_phases(
        list(engines),
        lambda name: engines[name].measure(prompt, given.new_tokens),
        settings,
        time.perf_counter,
    )
    found = throughputs_of(prefill, decode, settings, ended, watch.conditions())
    sys.stdout.write("\n" + json.dumps({k: v.to_dict() for k, v in found.items()}) + "\n")


if __name__ == "__main__":
    main()
