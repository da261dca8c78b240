"""What is known of a model before any of its weights is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghosted_fast.errors import ArgumentError
from ghosted_fast.models.built_whole import text_config_of
from ghosted_fast.models.checked.gguf_header import read_gguf_header
from ghosted_fast.models.loading import locate_model, read_config
from ghosted_fast.models.structure import counts_of

_POSITIONS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class Ahead:
    """What a model's configuration says of it; None where it does not.

    Attributes:
        num_layers: Its decoder layers.
        positions: The longest sequence that it reads.
    """

    num_layers: int | None = None
    positions: int | None = None

    @classmethod
    def of(cls, config: Any) -> Ahead:
        """Return what a configuration says."""
        text = text_config_of(config)
        counts = list(counts_of(text).values())
        positions = [getattr(text, name, None) for name in _POSITIONS]
        return cls(
            num_layers=counts[0] if counts else None,
            positions=next((n for n in positions if type(n) is int and n > 0), None),
        )

    def check_length(self, length: int, name: str) -> None:
        """Raise unless a model reads sequences of a length.

        Raises:
            ArgumentError: They are longer than its positions reach.
        """
        if self.positions is not None and length > self.positions:
            raise ArgumentError(
                f"expected {name} <= {self.positions}, the positions of the model, got {length}: "
                "cut the text into shorter sequences"
            )


def look_ahead(spec: str | Path, trust_remote_code: bool = False) -> Ahead:
    """Read what a model's configuration says of it, and none of its weights.

    Args:
        spec: A hub id, a local folder, or a GGUF file.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        SourceError: There is no such model, or its configuration cannot be read.
        CheckpointError: A GGUF file is damaged or incomplete.
    """
    name, gguf_file = locate_model(str(spec), None)
    if gguf_file is None:
        return Ahead.of(read_config(name, trust_remote_code))
    header = read_gguf_header(Path(name) / gguf_file)
    return Ahead(header.of_family("block_count"), header.of_family("context_length"))
