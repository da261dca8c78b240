"""Prefill and decoding speed of a real model: dense, naively pruned, and ghosted.

Gate first: the ghosted model's logits are compared with the dense model's, composed anew by hooks
(the hidden state before the gap goes through the ghost in fp64 and in at the end of the gap), and
a decoding step with its cache is compared with the whole sequence at once. No number is printed on
a wrong result. The models are measured in rounds in one process; see `compare_throughput`.

Bytes of a decoding step: every parameter once, but of the input embedding one row per prompt (where
it is tied, the head reads all of it). Flops of a step: 2 per parameter of a linear layer and token.
"""

from __future__ import annotations

import argparse
import copy
import datetime
from pathlib import Path
from typing import Any

import torch
from _results import append_rows, machine_folder
from rich.console import Console
from torch import Tensor, nn

from ghosted_fast.assets.downloads import fetch_demo_assets
from ghosted_fast.bench_ops.roofs import MEMORY, measure_roofs
from ghosted_fast.cli._shared.tables import model_table, speed_lines
from ghosted_fast.errors import GateError
from ghosted_fast.measure.models_table import ModelRow, compare_models, ratio
from ghosted_fast.measure.system import machine_facts
from ghosted_fast.models.families import decoder_layers, final_norm
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.loading import cast_parameters, load_model, resolve_dtype
from ghosted_fast.options import RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.testing import relative_rms
from ghosted_fast.text.loading import load_texts, token_batches
from ghosted_fast.timing.estimates import Estimate

# The criterion "ghost" chooses these of SmolLM2's 30 layers; the speed depends on their number.
REMOVED = tuple(range(14, 19))
CALIBRATION_TOKENS = 8192
GATE_TOKENS = 128
# Relative rms of the logits. In bf16 the two sides round the hidden state at different places.
GATE_BOUNDS = {"float32": 1e-4, "bfloat16": 3e-2}


def composed_logits(dense: Any, ghost: GhostLinear, ids: Tensor) -> Tensor:
    """Return the logits of the dense model with a ghost around its layers `REMOVED`, by hooks.

    Args:
        dense: The dense model; it computes the removed layers too, whose output is thrown away.
        ghost: The ghost; its parameters are used, not its forward.
        ids: Token ids [B, T]; the first of each row is the first token.

    Returns:
        Logits [B, T, V].
    """
    layers = decoder_layers(dense)
    stop = REMOVED[-1] + 1
    last: nn.Module = layers[stop] if stop < len(layers) else final_norm(dense)
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])

    def replace(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (ghost_in_fp64(ghost, seen[0]), *args[1:])

    handles = [
        layers[REMOVED[0]].register_forward_pre_hook(keep),
        last.register_forward_pre_hook(replace),
    ]
    try:
        logits: Tensor = dense(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits


def ghost_in_fp64(ghost: GhostLinear, x: Tensor) -> Tensor:
    """Return a ghost's output [B, T, d] for whole sequences, by the formula, in x's dtype."""
    wide = x.double()
    features = wide
    if ghost.norm_eps is not None:
        features = wide / (wide.square().mean(-1, keepdim=True) + ghost.norm_eps).sqrt()
    y = wide + features @ ghost.weight.double().mT
    if ghost.bias is not None:
        y = y + ghost.bias.double()
    if ghost.first_state is not None:
        y[:, 0] = ghost.first_state.double()
    return y.to(x.dtype)


@torch.inference_mode()
def gate(dense: Any, ghosted: Any, ids: Tensor, dtype: str) -> dict[str, float]:
    """Return the errors of the ghosted model, after checking that they are small enough.

    Raises:
        GateError: An error is above its bound.
    """
    [ghost] = [module for module in ghosted.modules() if isinstance(module, GhostLinear)]
    logits = ghosted(input_ids=ids, use_cache=False).logits
    before = ghosted(input_ids=ids[:, :-1], use_cache=True)
    step = ghosted(input_ids=ids[:, -1:], past_key_values=before.past_key_values, use_cache=True)
    errors = {
        "error_to_composition": relative_rms(logits, composed_logits(dense, ghost, ids)),
        "error_of_decode_step": relative_rms(step.logits, logits[:, -1:]),
    }
    for name, error in errors.items():
        if not error <= GATE_BOUNDS[dtype]:
            raise GateError(f"{name} in {dtype} is {error:.1e}, above {GATE_BOUNDS[dtype]:.0e}")
    return errors


def decode_bytes(model: Any, batch_size: int) -> int:
    """Return the bytes of parameters that one decoding step reads."""
    embedding = model.get_input_embeddings().weight
    total = sum(parameter.nbytes for parameter in model.parameters())
    if embedding is model.get_output_embeddings().weight:
        return total
    return total - embedding.nbytes + batch_size * embedding[0].nbytes


def linear_parameters(model: Any) -> int:
    """Return the parameters that each token is multiplied by."""
    linear = (module for module in model.modules() if isinstance(module, nn.Linear | GhostLinear))
    return sum(module.weight.numel() for module in linear)


def record(
    row: ModelRow,
    rows: list[dict[str, Any]],
    model: Any,
    errors: dict[str, float],
    roofs: dict[str, float],
    date: str,
) -> dict[str, Any]:
    """Return a line of the results file; the models of a run have one date."""
    speed = row.throughput
    assert speed is not None
    batch_size = speed.settings.batch_size
    step_s = batch_size / speed.decode_tokens_per_s.value
    size = decode_bytes(model, batch_size)
    flops = 2 * linear_parameters(model) * batch_size
    kind = "bf16" if row.dtype == "bfloat16" else "fp32"
    facts = row.to_dict()
    return {
        "benchmark": "generate",
        "model": row.name,
        "dtype": row.dtype,
        "layers": row.layers,
        "parameters": row.parameters,
        **speed.to_dict(),
        "prefill_ratio": _json(ratio(facts, rows, "prefill")),
        "decode_ratio": _json(ratio(facts, rows, "decode")),
        "decode_ms": 1e3 * step_s,
        "decode_bytes": size,
        "decode_flops": flops,
        "decode_gbps": size / step_s / 1e9,
        "decode_roof_share": max(size / roofs[MEMORY], flops / roofs[kind]) / step_s,
        "roof_gbps": roofs[MEMORY] / 1e9,
        "roof_gflops": roofs[kind] / 1e9,
        **errors,
        "machine": machine_facts(),
        "date": date,
    }


def _json(found: Estimate | None) -> dict[str, Any] | None:
    return None if found is None else found.to_dict()


def main() -> None:
    """Run the gate and the measurement for each dtype; append the rows to the results."""
    parser = argparse.ArgumentParser(description="Prefill and decoding: dense, pruned, ghosted")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=GATE_BOUNDS)
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--precision", type=float, default=0.005)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, default=machine_folder() / "generate.jsonl")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    assets = fetch_demo_assets()
    source, tokenizer = load_model(assets.model, torch.float32)
    batches = token_batches(tokenizer, load_texts(assets.calibration), CALIBRATION_TOKENS)
    speed = {
        "prompt_length": options.prompt_length,
        "new_tokens": options.new_tokens,
        "batch_size": options.batch_size,
        "precision": options.precision,
        "seconds": options.seconds,
        "interruptible": False,
    }
    console = Console(highlight=False, soft_wrap=True)
    roofs = measure_roofs()
    for dtype in options.dtype:
        dense = cast_parameters(copy.deepcopy(source), resolve_dtype(dtype) or torch.float32)
        ghosted, _ = ghost_model(dense, batches, removed=REMOVED, run=RunOptions(corrections=0))
        errors = gate(dense, ghosted, batches[0][:2, :GATE_TOKENS], dtype)
        models = {"dense": dense, "pruned": prune_model(dense, REMOVED), "ghosted": ghosted}
        rows = compare_models(models, speed=speed, progress=True)
        facts = [row.to_dict() for row in rows]
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        lines = [record(row, facts, models[row.name], errors, roofs, date) for row in rows]
        append_rows(options.output, lines)
        for line in lines:
            console.print(
                f"{line['model']:8} {dtype:9} decoding {line['decode_gbps']:.1f} GB/s, "
                f"{line['decode_roof_share']:.0%} of the roof"
            )
        table = model_table(rows)
        console.print("  ".join(table.columns))
        for cells in table.rows:
            console.print("  ".join(cells))
        for text in speed_lines(rows):
            console.print(text)


if __name__ == "__main__":
    main()
