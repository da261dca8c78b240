"""Run a ghosted folder in vLLM. The library's plug-in is found by vLLM itself.

    python examples/serve_vllm.py smaller "Why is the sky blue?"

A server for the same folder: `vllm serve smaller`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def answer(folder: Path, prompt: str, max_tokens: int = 48, **options: Any) -> str:
    """Return what the model in a folder writes after a prompt, the likeliest token each time.

    Args:
        folder: A folder that `ghosted-fast fit --output` or `gf.save_model` wrote.
        prompt: The prompt.
        max_tokens: Tokens to write.
        options: What else `vllm.LLM` is to be given.
    """
    from vllm import LLM, SamplingParams

    engine = LLM(model=str(folder), **options)
    settings = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return str(engine.generate([prompt], settings)[0].outputs[0].text)


def main() -> None:
    """Answer one prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what `ghosted-fast fit --output` wrote")
    parser.add_argument("prompt", nargs="?", default="Why is the sky blue?")
    given = parser.parse_args()
    print(answer(given.folder, given.prompt))


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
