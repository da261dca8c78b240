"""How closely smaller models follow the dense one, where nobody knows the right answer.

The dense model answers prompts, always with the likeliest token. Then every model reads prompts and
answers, and at each token of an answer, given all before it,

    agreement   argmax p = argmax q           p, q: next-token distributions of dense and smaller
    divergence  KL(p || q) = sum p log(p / q)

The first token at which the likeliest ones differ is where the two would part if both wrote by
themselves: up to there they have written the same. So one forward pass tells what greedy decoding
would, and a model is followed to the bit by itself, whatever a cache rounds otherwise.

Source: ours; the measures are common ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError, NonFiniteError, check_at_least
from ghosted_fast.measure.greedy import greedy_answers, padded
from ghosted_fast.measure.perplexity import parts_of
from ghosted_fast.models.decoder import evaluating
from ghosted_fast.ops import divergence
from ghosted_fast.ops.operands import FLOAT_DTYPES
from ghosted_fast.text.batches import Batch
from ghosted_fast.text.progress import progress_bar


@dataclass(frozen=True)
class Fidelity:
    """How closely a model follows the dense one.

    Attributes:
        agreement: Share of the answers' tokens of which both find the same likeliest.
        divergence: Mean of KL(dense || model) over these tokens, nats.
        parts_after: Tokens that both write alike before they part: the median over prompts; None
            where half of the prompts or more are answered alike to the end.
        never_parts: Share of the prompts that are answered alike to the end.
        num_tokens: Tokens of the answers.
        num_prompts: Prompts.
        new_tokens: Tokens of an answer, at most.
    """

    agreement: float
    divergence: float
    parts_after: float | None
    never_parts: float
    num_tokens: int
    num_prompts: int
    new_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


@torch.inference_mode()
def compare_with_dense(
    models: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    new_tokens: int = 64,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[str, Fidelity]:
    """Compare models with the first of them, on what that one answers.

    Args:
        models: Causal language models of one vocabulary by name, the dense one first.
        prompts: Tokens of each prompt, see `prompt_tokens`; of any lengths.
        new_tokens: Tokens of an answer, at most; an end-of-text token ends it earlier.
        batch_size: Prompts at a time.
        progress: Show progress bars on stderr.

    Returns:
        What is known of each model, the first included: it follows itself.

    Raises:
        ArgumentError: There is no model or no prompt, a prompt is empty, a number is below 1, or
            the vocabularies differ.
        NonFiniteError: A model's predictions are not finite.
    """
    check_at_least(1, batch_size=batch_size)
    if not models or not prompts:
        raise ArgumentError(f"expected models and prompts, got {len(models)} and {len(prompts)}")
    _check_vocabularies(models)
    dense = next(iter(models.values()))
    answers = greedy_answers(dense, prompts, new_tokens, batch_size, progress)
    pairs = list(zip(prompts, answers, strict=True))
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in models}
    with ExitStack() as stack, progress_bar("comparing", progress, of=len(pairs)) as bar:
        for model in models.values():
            stack.enter_context(evaluating(model))
        for batch, where in _batches(pairs, batch_size, dense):
            expected = _logits(dense, batch, where)
            counts = where.sum(1).tolist()
            for name, model in models.items():
                own = expected if model is dense else _logits(model, batch, where)
                same, divergences = _rows(expected, own.to(expected.device))
                found[name] += zip(same.split(counts), divergences.split(counts), strict=True)
            bar.update(len(counts))
    return {name: _summary(name, rows, new_tokens) for name, rows in found.items()}


def _check_vocabularies(models: Mapping[str, Any]) -> None:
    sizes = {
        name: int(model.get_output_embeddings().weight.shape[0]) for name, model in models.items()
    }
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise ArgumentError(
            f"expected models of one vocabulary, whose predictions can be compared, got {shown}: "
            "compare each with the dense model that it comes from"
        )


def _batches(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int, model: Any
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield prompts with their answers, and where a token of an answer is predicted [B, T] bool."""
    for first in range(0, len(pairs), batch_size):
        chosen = pairs[first : first + batch_size]
        whole = padded([[*prompt, *answer] for prompt, answer in chosen], before=False)
        begins = torch.tensor([[len(prompt) - 1] for prompt, _ in chosen])
        lengths = torch.tensor([[len(answer)] for _, answer in chosen])
        places = torch.arange(whole.input_ids.shape[1])
        where = (places >= begins) & (places < begins + lengths)
        row = 0
        for part in parts_of(whole, model):
            rows = len(part.input_ids)
            yield part, where[row : row + rows]
            row += rows


def _logits(model: Any, batch: Batch, where: Tensor) -> Tensor:
    """Return a model's logits [rows, vocabulary] at some places."""
    batch = batch.to(model.device)
    output = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits
    return output[where.to(output.device)]


def _rows(expected: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Return where two models' likeliest tokens agree [rows] bool, and KL(expected || own) [rows].

    Both on the processor; models of two dtypes are compared in the wider one.
    """
    dtype = torch.promote_types(expected.dtype, own.dtype)
    dtype = dtype if dtype in FLOAT_DTYPES else torch.float32
    divergences, _ = divergence(expected.to(dtype), own.to(dtype))
    same = expected.argmax(-1) == own.argmax(-1)
    return same.cpu(), divergences.cpu()


def _summary(name: str, rows: Sequence[tuple[Tensor, Tensor]], new_tokens: int) -> Fidelity:
    same = torch.cat([row for row, _ in rows])
    divergences = torch.cat([row for _, row in rows])
    if not bool(torch.isfinite(divergences).all()):
        raise NonFiniteError(
            f"expected finite predictions of {name!r}, got NaN or infinity: check the model in "
            "this dtype"
        )
    alike = [float("inf") if bool(row.all()) else int((~row).int().argmax()) for row, _ in rows]
    median = statistics.median(alike)
    return Fidelity(
        agreement=float(same.double().mean()),
        divergence=float(divergences.mean()),
        parts_after=None if median == float("inf") else float(median),
        never_parts=sum(count == float("inf") for count in alike) / len(alike),
        num_tokens=len(same),
        num_prompts=len(alike),
        new_tokens=new_tokens,
    )
