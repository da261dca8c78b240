"""A second look at the best candidates: each with its ghosts corrected, as the winner's will be.

The race judges fitted ghosts. Corrections bring back more in some gaps than in others, so the best
candidates of the race, which often differ by less than its noise, are corrected and judged again,
on the same held-out tokens. Corrections learn from the other folds alone.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from ghosted_fast.fit.candidates import score_gaps
from ghosted_fast.improve.correction import DEFAULT_HELD_OUT_TOKENS, correct_ghosts
from ghosted_fast.improve.gradients import check_gradients
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.gap import Gap
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.text.batches import Batch
from ghosted_fast.text.folds import check_split, split_sequences
from ghosted_fast.timing.spans import span

# Of each candidate. Most of what corrections bring comes with the first ones.
CORRECTIONS = 2


def check_second_look(decoder: Decoder, training: Sequence[Batch]) -> None:
    """Raise, before any work, unless candidates can be corrected.

    Args:
        decoder: The dense model.
        training: As in `corrected_losses`.

    Raises:
        CalibrationError: There is too little text to decide corrections on.
        UnsupportedModelError: The model passes no gradients back.
    """
    check_split(*split_sequences(training, DEFAULT_HELD_OUT_TOKENS))
    check_gradients(decoder.model)


def corrected_losses(
    decoder: Decoder,
    training: Sequence[Batch],
    held_out: Sequence[Batch],
    candidates: Sequence[Sequence[Gap]],
    progress: bool = False,
) -> list[float]:
    """Correct the ghosts of candidates, in place, and return the losses with them.

    Args:
        decoder: The dense model.
        training: The sequences that the ghosts were fitted on, see `training_batches`.
        held_out: Others, to score on.
        candidates: The gaps of each, ascending, with their ghosts.
        progress: Whether to show progress bars on stderr.

    Returns:
        Mean cross-entropy per token, nats, in the order of the candidates.
    """
    with span("second look"):
        for gaps in candidates:
            removed = [layer for gap in gaps for layer in range(gap.start, gap.stop)]
            trial = remove_layers(decoder.model, removed, [gap.ghost for gap in gaps])
            correct_ghosts(trial, decoder.model, training, CORRECTIONS, progress=progress)
        return score_gaps(decoder, held_out, candidates, len(candidates), progress)
