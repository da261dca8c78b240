"""Tables of the speed of whole models, in this library and in other engines."""

from __future__ import annotations

from typing import Any

from docs.generate.markdown import measured_ratio, measured_speed, table
from docs.generate.results import engine_rows, newest_rows

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
    settings = [row["ghosted"].get("settings", row["ghosted"]) for row in rows]
    in_rounds = all("settings" in row["ghosted"] for row in rows)
    how = ". ± is half of the 95 % interval" if in_rounds else ", medians of runs by turns"
    ((new_tokens, prompt_length),) = {(s["new_tokens"], s["prompt_length"]) for s in settings}
    (threads,) = {row["threads"] for row in rows}
    (processor,) = {row["machine"]["processor"] for row in rows}
    days = " and ".join(sorted({row["date"][:10] for row in rows}))
    return (
        f"Tokens per second of decoding, {_GIVEN} (25 of 30 layers are left): {new_tokens} tokens "
        f"after {prompt_length}, {threads} thread{'s' * (threads > 1)} of an {processor}, {days} "
        f"(`make bench-engines`){how}.\n\n"
    )


def engines() -> str:
    """Return the table of all engines, for a page in `docs`."""
    rows = []
    for row in engine_rows():
        name, page = _PAGES[row["engine"]]
        link = f"[{name}]({page.removeprefix('docs/')}) {row['version']}"
        rows.append([link, row["precision"], *_engine_cells(row)])
    columns = ["engine", "precision", *_MODELS, "ghosted / pruned", "ghosted / dense"]
    return _heading(engine_rows()) + table(columns, rows, 2)


def one_engine(engine: str) -> str:
    """Return the table of one engine, for its own page."""
    rows = [row for row in engine_rows() if row["engine"] == engine]
    columns = ["precision", *_MODELS, "ghosted / pruned", "ghosted / dense"]
    cells = [[row["precision"], *_engine_cells(row)] for row in rows]
    return _heading(rows) + table(columns, cells)


def where_it_runs() -> str:
    """Return the README's table: engines, tested versions, and the speed over dense."""
    rows = []
    for engine, (name, page) in _PAGES.items():
        found = [row for row in engine_rows() if row["engine"] == engine]
        precisions = [
            f"{row['precision']} {measured_ratio(row['ghosted_to_dense'])}" for row in found
        ]
        rows.append([f"[{name}]({page})", found[0]["version"], ", ".join(precisions)])
    (threads,) = {row["threads"] for row in engine_rows()}
    where = f"5 of 30 layers gone, {threads} thread{'s' * (threads > 1)}"
    return table(["engine", "tested version", f"decoding relative to dense, {where}"], rows, 3)


def models() -> str:
    """Return the table of dense, pruned and ghosted model in this library."""
    found = newest_rows("generate")
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
        f"{row['machine']['threads']} threads of an {row['machine']['processor']}, "
        f"{row['date'][:10]}. ± is half of the 95 % interval.\n\n"
    )
    return heading + table(columns, rows, 2)


def deployment() -> str:
    """Return the table of latencies and memory of dense, pruned and ghosted model."""
    rows = []
    for row in sorted(newest_rows("generate"), key=lambda row: str(row["dtype"])):
        steps = row["token_ms"]
        rows.append([row["dtype"], row["model"], measured_speed(row["first_token_ms"])])
        rows[-1] += [f"{steps[name]:.1f}" for name in ("p50", "p95", "p99")]
        rows[-1] += [f"{row[name] / 2**20:.1f}" for name in ("weight_bytes", "cache_bytes")]
    columns = ["dtype", "model", "first token, ms", "token, ms", "95th of 100", "99th of 100"]
    return table([*columns, "weights, MiB", "cache, MiB"], rows, 2)


def calibration() -> str:
    """Return what the statistics and the scores cost, in units of forward passes."""
    found = newest_rows("calibration")
    rows = []
    for row in found:
        if row["what"] == "memory":
            share = (row["peak"] - row["bare"]) / row["statistics"]
            what = f"memory above the forward pass, {row['tokens']:,} tokens"
            rows.append([what, row["dtype"], f"{share:.1f} of the statistics' size"])
        elif row["what"] == "scoring":
            what = f"scoring {row['intervals']:.0f} candidates on 2048 tokens"
            rows.append([what, row["dtype"], f"{row['ratio']:.2f} of evaluating as many models"])
        else:
            what = f"statistics of {row['what']} ({row['intervals']}), whole pass"
            cost = f"{measured_ratio(row['ratio'])} the bare forward pass"
            rows.append([what, row["dtype"], cost])
    return table(["what", "dtype", "cost"], rows, 3)
