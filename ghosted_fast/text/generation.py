"""Text that a model writes itself, to calibrate on where there is no other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError, SourceError, check_at_least
from ghosted_fast.text.loading import adds_bos
from ghosted_fast.text.progress import progress_bar

# Sampled at once, where 128 are no faster per token on a processor.
_ROWS = 64
_LENGTH = 256


@torch.inference_mode()
def generate_texts(
    model: Any,
    tokenizer: Any,
    num_tokens: int,
    sequence_length: int = _LENGTH,
    batch_size: int = _ROWS,
    temperatures: Sequence[float] = (1.0,),
    seed: int = 0,
    progress: bool = False,
) -> Iterator[str]:
    """Sample texts from the model itself, where there is no text to calibrate on.

    Every text starts with a random token of the vocabulary, after the BOS token if the tokenizer
    adds one by itself, and goes on past any end-of-text token. The texts are the same whenever seed
    and batch size are. The global random state is neither read nor changed.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        num_tokens: Tokens wanted, counted after the texts have been tokenised anew.
        sequence_length: Tokens of each text, those that it starts with included.
        batch_size: Texts sampled at a time.
        temperatures: Each divides the logits of as many texts as any other; above 0.
        seed: Of starts and sampling.
        progress: Show a progress bar on stderr.

    Returns:
        An iterator of texts which hold `num_tokens` tokens or a few more.

    Raises:
        ArgumentError: A temperature is not above 0, there is none, or a number is too small.
        SourceError: What the model writes is empty.
    """
    if not temperatures or not all(value > 0 for value in temperatures):
        raise ArgumentError(f"expected temperatures above 0, got {list(temperatures)}")
    check_at_least(2, sequence_length=sequence_length)
    check_at_least(1, batch_size=batch_size)
    generator = torch.Generator().manual_seed(seed)
    found = 0
    with progress_bar("writing", progress, of=num_tokens, tokens=True) as bar:
        while found < num_tokens:
            before = found
            starts = _starts(tokenizer, batch_size, generator).to(model.device)
            rows = _sample(
                model, starts, sequence_length, len(tokenizer), temperatures, generator, bar
            )
            for text in tokenizer.batch_decode(rows, skip_special_tokens=True):
                found += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
                yield text
            if found == before:
                raise SourceError(
                    f"the model's own text is empty after {found} of {num_tokens} tokens: "
                    "name a text file instead of 'self'"
                )


def _starts(tokenizer: Any, count: int, generator: torch.Generator) -> Tensor:
    """Return what texts start with, [count, 1 or 2] int64: BOS if need be, and a random token."""
    special = torch.zeros(len(tokenizer), dtype=torch.bool)
    special[tokenizer.all_special_ids] = True
    ordinary = (~special).nonzero()
    starts = ordinary[torch.randint(len(ordinary), (count,), generator=generator)]
    if adds_bos(tokenizer):
        starts = torch.cat([torch.full_like(starts, tokenizer.bos_token_id), starts], dim=1)
    return starts


def _sample(
    model: Any,
    tokens: Tensor,
    length: int,
    vocabulary: int,
    temperatures: Sequence[float],
    generator: torch.Generator,
    bar: Any,
) -> Tensor:
    """Continue rows of tokens [batch, start] to [batch, length], int64."""
    heat = torch.tensor(temperatures, device=tokens.device)
    heat = heat[torch.arange(len(tokens), device=tokens.device) % len(temperatures), None]
    current, cache = tokens, None
    while tokens.shape[1] < length:
        output = model(input_ids=current, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        logits = output.logits[:, -1, :vocabulary].float() / heat
        # By the inverse of the distribution function: multinomial takes as long as a small model.
        reached = logits.softmax(-1).cumsum(-1)
        drawn = torch.rand(len(tokens), 1, generator=generator).to(tokens.device)
        current = torch.searchsorted(reached, drawn * reached[:, -1:]).clamp_(max=vocabulary - 1)
        tokens = torch.cat([tokens, current], dim=1)
        bar.update(len(tokens))
    return tokens
