"""Conversations as a model writes them: what a chat template writes, and what is sampled between.

What a user asks is sampled too, behind what opens the user's turn: a model that was trained on
conversations goes on with a question. Then stands what the template writes up to the answer.

Source: Xu et al., Magpie, arXiv 2406.08464, of which no filter is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghosted_fast.text.bos import adds_bos
from ghosted_fast.text.chat import around_question


@dataclass(frozen=True)
class Turns:
    """What stands around a question and its answer.

    Attributes:
        opening: Tokens up to the question, with the BOS token where the tokenizer adds one.
        closing: Tokens from there to the answer, at least one.
        ends: Tokens that end a question or an answer.
        unsaid: How many tokens of the opening are not written: the BOS token if it is added.
    """

    opening: tuple[int, ...]
    closing: tuple[int, ...]
    ends: frozenset[int]
    unsaid: int

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Turns:
        """Return those of a tokenizer's chat template.

        Raises:
            SourceError: The template refuses a message, or does not write it as it is.
        """

        def tokens(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

        before, behind = around_question(tokenizer)
        # A space is part of the word behind it, which is not yet there.
        opening, unsaid = tokens(before.rstrip(" ")), int(adds_bos(tokenizer))
        if unsaid and opening[:1] != [tokenizer.bos_token_id]:
            opening = [tokenizer.bos_token_id, *opening]
        begun, whole = tokens(before + "a"), tokens(before + "a" + behind)
        closing = whole[len(begun) :] if whole[: len(begun)] == begun else tokens(behind)
        ends = end_tokens(model) | {tokenizer.eos_token_id} - {None}
        # What ends the user's turn ends others too, unless it is a word.
        ends |= {closing[0]} & set(tokenizer.all_special_ids)
        return cls(tuple(opening), tuple(closing), frozenset(ends), unsaid)


class Conversations:
    """Rows of conversations that are sampled at once, each of them one question and its answer.

    Args:
        turns: What stands around them.
        count: How many rows.
        said: Tokens that the model writes at most; a question takes half of them at most.
        device: Where tokens are drawn.

    Attributes:
        starts: Tokens that all rows start with, [count, opening] int64.
        length: Tokens of a row at most.
    """

    def __init__(self, turns: Turns, count: int, said: int, device: torch.device) -> None:
        self.starts = torch.tensor([turns.opening] * count, device=device)
        self.length = len(turns.opening) + len(turns.closing) + said
        self._closing = torch.tensor(turns.closing, device=device)
        self._ends = torch.tensor(sorted(turns.ends), dtype=torch.int64, device=device)
        self._unsaid, self._longest = turns.unsaid, said // 2
        # Of each row: -1 in the question, then how much there is of the closing, then one more
        # once the answer has ended.
        self._stage = torch.full((count,), -1, device=device)
        self._asked = torch.zeros_like(self._stage)
        self._written = torch.full_like(self._stage, len(turns.opening))

    def take(self, drawn: Tensor) -> Tensor:
        """Return the next token of each row [count, 1]: what was drawn, or what the template has.

        Args:
            drawn: [count, 1] int64.
        """
        token, stage, closing = drawn[:, 0], self._stage, len(self._closing)
        ends = torch.isin(token, self._ends)
        over = ends | (token == self._closing[0]) | (self._asked == self._longest)
        stage = torch.where((stage < 0) & over, 0, stage)
        self._asked += stage < 0
        self._written += stage <= closing
        forced = (stage >= 0) & (stage < closing)
        token = torch.where(forced, self._closing[stage.clamp(0, closing - 1)], token)
        self._stage = stage + (forced | (ends & (stage == closing)))
        return token[:, None]

    @property
    def have_ended(self) -> bool:
        """Whether every answer has come to its end."""
        return bool((self._stage > len(self._closing)).all())

    def texts(self, tokenizer: Any, rows: Tensor) -> list[str]:
        """Return the conversations as the template writes them, but for those without a question.

        Args:
            tokenizer: A transformers tokenizer.
            rows: [count, at most `length`] int64.
        """
        written = [
            row[self._unsaid : stop]
            for row, stop, asked in zip(
                rows.tolist(), self._written.tolist(), self._asked.tolist(), strict=True
            )
            if asked
        ]
        return list(tokenizer.batch_decode(written, clean_up_tokenization_spaces=False))


def end_tokens(model: Any) -> frozenset[int]:
    """Return the tokens behind which a model writes nothing more."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)
