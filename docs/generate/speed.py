"""Tables of the speed of whole models, in this library and in other engines."""

from __future__ import annotations

import math
from typing import Any

from docs.generate.markdown import by_machine, measured_ratio, measured_speed, table
from docs.generate.results import Machine, engine_rows
from ghosted_fast.cli._shared.tables import profile_table
from ghosted_fast.timing.estimates import Estimate

_PAGES = {
    "transformers": ("transformers", "docs/transformers.md"),
    "vllm": ("vLLM", "docs/vllm.md"),
    "llama.cpp": ("llama.cpp", "docs/gguf.md"),
    "ort-genai": ("ONNX Runtime GenAI", "docs/ort-genai.md"),
}
_MODELS = ("dense", "pruned", "ghosted")
_GIVEN = "SmolLM2-135M-Instruct without layers 14-18"


def _engine_cells(row: dict[str, Any]) -> list[str]:
    speeds = [measured_speed(row[name]["decode_tokens_per_s"]) for name in _MODELS]
    ratios = [measured_ratio(row[f"ghosted_to_{name}"]) for name in ("pruned", "dense")]
    return [*speeds, *ratios]


def _heading(rows: list[dict[str, Any]]) -> str:
    settings = [row["ghosted"]["settings"] for row in rows]
    ((new_tokens, prompt_length),) = {(s["new_tokens"], s["prompt_length"]) for s in settings}
    (threads,) = {row["threads"] for row in rows}
    days = " and ".join(sorted({row["date"][:10] for row in rows}))
    return (
        f"Tokens per second of decoding, {_GIVEN} (25 of 30 layers are left): {new_tokens} tokens "
        f"after {prompt_length}, {threads} thread{'s' * (threads > 1)}, {days} "
        f"(`make bench-engines`). ± is half of the 95 % interval.\n\n"
    )


def _when(found: list[dict[str, Any]]) -> str:
    """Return on how many threads and on which day rows were measured."""
    return f"{found[0]['machine']['threads']} threads, {found[0]['date'][:10]}"


def engines() -> str:
    """Return the tables of all engines, for a page in `docs`."""
    return by_machine(lambda machine: machine.engines, _engines_of)


def _engines_of(found: list[dict[str, Any]]) -> str:
    rows = []
    for row in found:
        name, page = _PAGES[row["engine"]]
        link = f"[{name}]({page.removeprefix('docs/')}) {row['version']}"
        rows.append([link, row["precision"], *_engine_cells(row)])
    columns = ["engine", "precision", *_MODELS, "ghosted / pruned", "ghosted / dense"]
    return _heading(found) + table(columns, rows, 2)


def one_engine(engine: str) -> str:
    """Return the tables of one engine, for its own page."""
    columns = ["precision", *_MODELS, "ghosted / pruned", "ghosted / dense"]

    def has(machine: Machine) -> list[dict[str, Any]]:
        return [row for row in machine.engines if row["engine"] == engine]

    def show(rows: list[dict[str, Any]]) -> str:
        cells = [[row["precision"], *_engine_cells(row)] for row in rows]
        return _heading(rows) + table(columns, cells)

    return by_machine(has, show)


def where_it_runs() -> str:
    """Return the README's table: engines, tested versions, and the speed over dense."""
    rows = []
    found = engine_rows()
    for engine, (name, page) in _PAGES.items():
        mine = [row for row in found if row["engine"] == engine]
        precisions = [
            f"{row['precision']} {measured_ratio(row['ghosted_to_dense'])}" for row in mine
        ]
        rows.append([f"[{name}]({page})", mine[0]["version"], ", ".join(precisions)])
    ((threads, processor),) = {(row["threads"], row["machine"]["processor"]) for row in found}
    where = f"5 of 30 layers gone, {threads} thread{'s' * (threads > 1)} of an {processor}"
    return table(["engine", "tested version", f"decoding relative to dense, {where}"], rows, 3)


def models() -> str:
    """Return the tables of dense, pruned and ghosted model in this library."""
    return by_machine(lambda machine: machine.newest("generate"), _models_of)


def _models_of(found: list[dict[str, Any]]) -> str:
    rows = []
    for dtype in ("bfloat16", "float32"):
        by_model = {row["model"]: row for row in found if row["dtype"] == dtype}
        for name in _MODELS:
            row = by_model[name]
            cells = [dtype, name, str(row["layers"])]
            for kind in ("prefill", "decode"):
                cells.append(measured_speed(row[f"{kind}_tokens_per_s"]))
                for other in ("dense", "pruned"):
                    ratios = row["relative"].get(other)
                    cells.append(measured_ratio(ratios and ratios[kind]))
            rows.append(cells)
    columns = ["dtype", "model", "layers"]
    columns += ["prefill", "/ dense", "/ pruned", "decoding", "/ dense", "/ pruned"]
    row = found[0]
    settings = row["settings"]
    heading = (
        f"Tokens per second, {_GIVEN}: batch {settings['batch_size']}, prompts of "
        f"{settings['prompt_length']} tokens, {settings['new_tokens']} new ones, "
        f"{_when(found)}. ± is half of the 95 % interval.\n\n"
    )
    return heading + table(columns, rows, 2)


def deployment() -> str:
    """Return the tables of latencies and memory of dense, pruned and ghosted model."""
    return by_machine(lambda machine: machine.newest("generate"), _deployment_of)


def _deployment_of(found: list[dict[str, Any]]) -> str:
    rows = []
    for row in sorted(found, key=lambda row: str(row["dtype"])):
        steps = row["token_ms"]
        rows.append([row["dtype"], row["model"], measured_speed(row["first_token_ms"])])
        rows[-1] += [f"{steps[name]:.1f}" for name in ("p50", "p95", "p99")]
        rows[-1] += [f"{row[name] / 2**20:.1f}" for name in ("weight_bytes", "cache_bytes")]
    columns = ["dtype", "model", "first token, ms", "token, ms", "95th of 100", "99th of 100"]
    return f"{_when(found)}.\n\n" + table([*columns, "weights, MiB", "cache, MiB"], rows, 2)


def calibration() -> str:
    """Return what the statistics and the scores cost, in units of forward passes."""
    return by_machine(lambda machine: machine.newest("calibration"), _calibration_of)


def _calibration_of(found: list[dict[str, Any]]) -> str:
    rows = []
    for row in found:
        if row["what"] == "memory":
            share = (row["peak"] - row["bare"]) / row["statistics"]
            what = f"memory above the forward pass, {row['tokens']:,} tokens"
            rows.append([what, row["dtype"], f"{share:.1f} of the statistics' size"])
        elif row["what"] == "scoring":
            what = f"scoring {row['intervals']:.0f} candidates on 2048 tokens"
            cost = f"{Estimate(**row['ratio'])} of evaluating as many models"
            rows.append([what, row["dtype"], cost])
        else:
            what = f"statistics of {row['what']} ({row['intervals']}), whole pass"
            cost = f"{measured_ratio(row['ratio'])} the bare forward pass"
            rows.append([what, row["dtype"], cost])
    return f"{_when(found)}.\n\n" + table(["what", "dtype", "cost"], rows, 3)


def same_model() -> str:
    """Return how often, and how narrowly, one model under two names was found to be one."""
    return by_machine(lambda machine: machine.newest("timing"), _same_model_of)


def _same_model_of(found: list[dict[str, Any]]) -> str:
    rows = []
    for phase in ("prefill", "decode"):
        ratios = [Estimate(**row[phase]) for row in found]
        holding = sum(ratio.holds_one for ratio in ratios)
        mean = math.exp(sum(math.log(ratio.value) for ratio in ratios) / len(ratios))
        halves = sorted(ratio.half_width for ratio in ratios)
        rows.append([phase, f"{holding} of {len(ratios)}", f"{mean:.4f}"])
        rows[-1] += [f"{100 * half:.1f} %" for half in (halves[len(halves) // 2], halves[-1])]
    longest = max(row["seconds"] for row in found)
    heading = (
        f"SmolLM2-135M-Instruct, {found[0]['dtype']}, {_when(found)}: {len(found)} runs of at most "
        f"{longest:.0f} seconds.\n\n"
    )
    columns = ["", "intervals that hold 1", "mean ratio", "± in the middle", "± at most"]
    return heading + table(columns, rows)


def fit() -> str:
    """Return where the time of a fit with the defaults goes."""
    return by_machine(lambda machine: machine.newest("fit"), _fit_of)


def _fit_of(found: list[dict[str, Any]]) -> str:
    (row,) = found
    parts = profile_table(row["spans"])
    heading = (
        f"{_when(found)}: {row['seconds']:.0f} seconds, "
        f"{Estimate(**row['passes'])} forward passes of the {row['tokens']:,} tokens.\n\n"
    )
    # Blanks at the start of a cell are lost in Markdown.
    cells = [[name.replace("  ", "· "), *rest] for name, *rest in parts.rows]
    return heading + table(parts.columns, cells)
