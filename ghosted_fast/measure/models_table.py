"""One table of models: size, perplexity and speed side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ghosted_fast.facts import notebook_table
from ghosted_fast.measure.perplexity import Perplexity, perplexity
from ghosted_fast.measure.speed import compare_throughput
from ghosted_fast.measure.throughput import Phase, Throughput
from ghosted_fast.models.families import num_layers
from ghosted_fast.timing.estimates import Estimate, speed_text


@dataclass(frozen=True)
class ModelRow:
    """What is known of one model.

    Attributes:
        name: What the table calls it.
        dtype: Dtype of its weights, without the prefix "torch.".
        layers: Decoder layers.
        parameters: Parameters, tied ones counted once.
        perplexity: Its perplexity, if measured.
        throughput: Its speed, if measured.
    """

    name: str
    dtype: str
    layers: int
    parameters: int
    perplexity: Perplexity | None = None
    throughput: Throughput | None = None

    def _repr_html_(self) -> str:
        rows = [
            ("dtype", self.dtype),
            ("layers", str(self.layers)),
            ("parameters", f"{self.parameters / 1e6:,.1f} M"),
        ]
        if self.perplexity is not None:
            found = self.perplexity
            interval = f"{found.low:.2f} to {found.high:.2f}"
            rows.append(("perplexity", f"{found.value:.2f} ({interval})"))
        if self.throughput is not None:
            speed = speed_text(self.throughput.decode_tokens_per_s)
            rows.append(("decode", f"{speed} tokens/s"))
        return notebook_table(self.name, rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


def compare_models(
    models: Mapping[str, Any],
    evaluation: Iterable[Any] | None = None,
    speed: Mapping[str, Any] | None = None,
    progress: bool = False,
    seed: int = 0,
) -> list[ModelRow]:
    """Measure models on the same tokens and, in turn, for speed.

    Args:
        models: The models by name.
        evaluation: Batches for the perplexity, read once for each model; `None` leaves it out.
        speed: Arguments of `compare_throughput`, for example `{"seconds": 30}`; `None` leaves the
            speed out.
        progress: Show progress bars on stderr.
        seed: Of the perplexity's bootstrap.

    Returns:
        A row for each model, in the order given.
    """
    batches = None if evaluation is None else list(evaluation)
    losses = {
        name: None if batches is None else perplexity(model, batches, seed=seed, progress=progress)
        for name, model in models.items()
    }
    speeds: Mapping[str, Throughput] = {}
    if speed is not None:
        speeds = compare_throughput(models, **{"progress": progress, **speed})
    return [
        ModelRow(
            name=name,
            dtype=str(model.dtype).removeprefix("torch."),
            layers=num_layers(model),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            perplexity=losses[name],
            throughput=speeds.get(name),
        )
        for name, model in models.items()
    ]


def ratio(
    row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], phase: Phase
) -> Estimate | None:
    """Return how many times as fast as the dense model of the same dtype a row's model is.

    Args:
        row: A `ModelRow` as a dict.
        rows: All rows; the first of the row's dtype is the dense model.
        phase: What is compared.

    Returns:
        The ratio as it was measured, within rounds; None of the dense model itself, and where the
        two were not measured together.
    """
    dense = next(other for other in rows if other["dtype"] == row["dtype"])
    relative = (row.get("throughput") or {}).get("relative", {})
    found = relative.get(dense["name"])
    return None if found is None else Estimate(**found[phase])
