"""What models write after a few prompts, to be read side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ghosted_fast.models.decoder import evaluating

PROMPTS = (
    "The capital of France is",
    "To bake bread at home, you first",
    "She opened the old letter and",
)
_NEW_TOKENS = 40


@torch.inference_mode()
def write_answers(
    models: Mapping[str, Any],
    tokenizer: Any,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = _NEW_TOKENS,
) -> list[dict[str, str]]:
    """Let each model go on after each prompt, always with the likeliest token.

    Args:
        models: Causal language models by name.
        tokenizer: Theirs.
        prompts: What they are given.
        new_tokens: Tokens that they write at most.

    Returns:
        For each prompt and model a dict of name, prompt and text: what stands on a report.
    """
    found = []
    for prompt in prompts:
        given = torch.tensor([tokenizer(prompt)["input_ids"]])
        for name, model in models.items():
            with evaluating(model):
                ids = given.to(model.device)
                written = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
                )
            text = tokenizer.decode(written[0, given.shape[1] :], skip_special_tokens=True)
            found.append({"name": name, "prompt": prompt, "text": text.strip()})
    return found
