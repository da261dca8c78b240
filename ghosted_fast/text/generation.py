"""Text that a model writes itself, to calibrate on where there is no other."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError, SourceError, check_at_least
from ghosted_fast.text.bos import adds_bos
from ghosted_fast.text.progress import progress_bar
from ghosted_fast.text.turns import Conversations, Turns

_LOGGER = logging.getLogger(__name__)
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
    chat: bool | None = None,
) -> Iterator[str]:
    """Sample texts from the model itself, where there is no text to calibrate on.

    Where the tokenizer has a chat template, every text is a conversation: a question, sampled
    behind what the template opens a user's turn with, and the answer (Magpie, arXiv 2406.08464).
    Otherwise it starts with a random token of the vocabulary and goes on past any end-of-text
    token. Both begin with the BOS token if the tokenizer adds one by itself, which the text does
    not hold. The texts are the same whenever seed and batch size are. The global random state is
    neither read nor changed.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        num_tokens: Tokens wanted, counted after the texts have been tokenised anew.
        sequence_length: Tokens of each text, those that it starts with included. Of a conversation
            the most that the model writes; what the template writes comes on top.
        batch_size: Texts sampled at a time.
        temperatures: Each divides the logits of as many texts as any other; above 0.
        seed: Of starts and sampling.
        progress: Show a progress bar on stderr.
        chat: Whether to write conversations; by default where there is a chat template that opens
            turns.

    Returns:
        An iterator of texts which hold `num_tokens` tokens or a few more.

    Raises:
        ArgumentError: A temperature is not above 0, there is none, a number is too small, or
            conversations are asked for without a template.
        SourceError: What the model writes is empty; with `chat=True` also: the template opens no
            turns.
    """
    if not temperatures or not all(value > 0 for value in temperatures):
        raise ArgumentError(f"expected temperatures above 0, got {list(temperatures)}")
    check_at_least(2, sequence_length=sequence_length)
    check_at_least(1, batch_size=batch_size)
    generator = torch.Generator().manual_seed(seed)
    turns = _turns(model, tokenizer, chat)
    found = 0
    with progress_bar("writing", progress, of=num_tokens, tokens=True) as bar:
        while found < num_tokens:
            before = found
            how = len(tokenizer), temperatures, generator, bar
            if turns is None:
                starts = _starts(tokenizer, batch_size, generator).to(model.device)
                rows = _sample(model, starts, sequence_length, *how)
                texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
            else:
                talk = Conversations(turns, batch_size, sequence_length, model.device)
                rows = _sample(model, talk.starts, talk.length, *how, talk)
                texts = talk.texts(tokenizer, rows)
            for text in texts:
                found += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
                yield text
            if found == before:
                raise SourceError(
                    f"the model's own text is empty after {found} of {num_tokens} tokens: "
                    "name a text file instead of 'self'"
                )


def _turns(model: Any, tokenizer: Any, chat: bool | None) -> Turns | None:
    """Return what stands around questions and answers; None where plain text is to be written."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if chat and not has_template:
        raise ArgumentError(
            "expected a tokenizer with a chat template for chat=True, got one without: give it "
            "the template of the model, or leave chat out"
        )
    if chat is False or not has_template:
        return None
    try:
        return Turns.of(model, tokenizer)
    except SourceError as error:
        if chat:
            raise
        _LOGGER.warning("the model writes plain text and no conversations: %s", error)
        return None


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
    talk: Conversations | None = None,
) -> Tensor:
    """Continue rows of tokens [batch, start] to [batch, length], int64, or until all talk ends."""
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
        if talk is not None:
            current = talk.take(current)
        tokens = torch.cat([tokens, current], dim=1)
        bar.update(len(tokens))
        if talk is not None and talk.have_ended:
            break
    return tokens
