"""The report: complete, self-contained, safe, and written whole or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.html_balance import Balance
from support.speeds import speed_of

from ghosted_fast.errors import ArgumentError, MissingExtraError
from ghosted_fast.measure.models_table import ModelRow, compare_models, ratio
from ghosted_fast.measure.perplexity import Perplexity
from ghosted_fast.reports import page as report_module
from ghosted_fast.reports.page import render_report, write_report
from ghosted_fast.testing import random_tokens, tiny_model


def row(name: str, dtype: str, decode: float, **others: float) -> dict[str, Any]:
    speed = speed_of(decode, **others)
    quality = Perplexity(29.08, 23.8, 35.9, 5110, (3.3, 3.4), (511, 511), 0.95)
    return ModelRow(name, dtype, 30, 134_515_008, quality, speed).to_dict()


def full_report() -> dict[str, Any]:
    return {
        "model": "some/model",
        "num_layers": 30,
        "removed": [3, 14, 15, 16],
        "criterion": "ghost",
        "scores": [
            {"start": start, "stop": start + 3, "score": 3.3 + abs(start - 14)}
            for start in range(28)
        ],
        "ghosts": [
            {
                "start": 14,
                "stop": 17,
                "features": "normed",
                "bias": False,
                "first_state": True,
                "fit_error": 0.31,
                "held_out_error": None,
                "condition": 3e6,
                "damping": 1e-4,
                "num_tokens": 49152,
            }
        ],
        "num_tokens": 49152,
        "seconds": {"select": 60.0, "solve": 1.5},
        "models": [row("dense", "bfloat16", 30.0), row("ghosted", "bfloat16", 36.0, dense=30.0)],
        "samples": [{"name": "ghosted", "prompt": "Why?", "text": "<b>Because</b>."}],
        "checks": [{"label": "reloaded", "passed": True, "detail": "same logits"}],
        "machine": {"processor": "a fast one"},
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "title"),
    [("some/model", "some/model"), ("/home/me/llama.gguf", "llama.gguf"), (None, "Ghosted model")],
)
def test_the_title_tells_nothing_of_the_machine(model: str | None, title: str) -> None:
    page = render_report({**full_report(), "model": model})
    assert f"<title>{title}</title>" in page and "/home/me" not in page


@pytest.mark.slow
def test_full_page() -> None:
    page = render_report(full_report())
    for expected in (
        "<title>some/model</title>",
        "4 of 30 layers removed, 3, 14-16",
        "49,152 tokens in 61.5 s",
        "29.08",
        "1.20x ± 0.01",
        "134.5 M",
        "3.0e+06",
        "&lt;b&gt;Because&lt;/b&gt;.",
        "same logits",
        "a fast one",
        "prefers-color-scheme: dark",
    ):
        assert expected in page, expected
    assert page.count("<svg") == 2
    balance = Balance()
    balance.feed(page)
    assert balance.open == []


@pytest.mark.slow
def test_page_shows_tasks_and_likeness() -> None:
    report = full_report()
    assert "Likeness" not in render_report(report) and "<h2>Tasks" not in render_report(report)
    dense, ghosted = report["models"]
    score = {"value": 0.75, "stderr": 0.021, "flips": None, "num_samples": 50}
    follows = {"agreement": 1.0, "divergence": 0.0, "parts_after": None, "never_parts": 1.0,
               "num_tokens": 1900, "num_prompts": 32, "new_tokens": 64}  # fmt: skip
    dense |= {"fidelity": follows, "tasks": [{"task": "local/quartz", **score}]}
    dense |= {"exact_answers": [{"kind": "copying", **score}]}
    apart = {"agreement": 0.875, "divergence": 0.1234, "parts_after": 7.5, "never_parts": 0.25}
    ghosted |= {"fidelity": follows | apart}
    ghosted |= {"tasks": [{"task": "local/quartz", **score, "flips": 0.1}]}
    ghosted |= {"exact_answers": [{"kind": "copying", **score, "flips": 0.32}]}
    page = render_report(report)
    for expected in (
        "<th>local/quartz</th>",
        "75.0 <small>± 2.1</small> <small>10.0 flip</small>",
        "<h2>Likeness to dense</h2>",
        "<td>100.0</td><td>0.0000</td><td>over 64</td><td>100.0</td>",
        "<td>87.5</td><td>0.1234</td><td>7.5</td><td>25.0</td>",
        "answered 32 prompts with 1,900 tokens",
        "<th>copying</th>",
        "<small>32.0 flip</small>",
    ):
        assert expected in page, expected
    balance = Balance()
    balance.feed(page)
    assert balance.open == []


def healing(**given: Any) -> dict[str, Any]:
    """Return what a report says of a healing, some of it otherwise."""
    curve = [(0, 0.42), (10_000, 0.31), (20_000, 0.25), (30_000, 0.26)]
    return {
        "before": 0.42,
        "after": 0.25,
        "tokens": 30_000,
        "best_tokens": 20_000,
        "rank": 32,
        "maps": 175,
        "ghosts": 1,
        "trained_parameters": 9_876_543,
        "curve": [{"tokens": tokens, "divergence": value} for tokens, value in curve],
        "ended": "tokens",
        "seconds": 301.4,
        **given,
    }


@pytest.mark.slow
def test_page_says_what_was_trained() -> None:
    assert "; nothing was trained." in render_report(full_report())
    report = full_report() | {"healing": healing()}
    report["seconds"]["heal"] = 301.4
    page = render_report(report)
    assert "nothing was trained" not in page and "49,152 tokens in 61.5 s" in page
    assert (
        "the ghost and factors of rank 32 of 175 linear maps (9,876,543 numbers) were trained on "
        "30,000 tokens in 301 s (the state after 20,000 is kept): held-out divergence from the "
        "dense model&#39;s predictions 0.4200 to 0.2500 nats"
    ) in page
    assert page.count("<svg") == 3 and "tokens learned from" in page and "30,000" in page
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    ids = re.findall(r'<svg.*?\bid="([^"]+)"', page, re.DOTALL)
    assert len(set(ids)) == len(ids)
    alone = render_report({"healing": healing(maps=0, rank=0, trained_parameters=331_776)})
    assert "the ghost alone (331,776 numbers) was trained" in alone
    useless = healing(ghosts=2, maps=0, best_tokens=0, after=0.42)
    said = render_report({"healing": useless})
    assert "the 2 ghosts alone" in said and "no step helped, and nothing was changed" in said


@pytest.mark.slow
def test_page_needs_nothing_else() -> None:
    page = render_report(full_report())
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "<script" not in page


@pytest.mark.slow
def test_figures_take_the_colours_of_the_page() -> None:
    for svg in re.findall(r"<svg.*?</svg>", render_report(full_report()), re.DOTALL):
        assert "var(--ink)" in svg
        assert not re.search(r"#[0-9a-f]{6}\b", svg)
    page = render_report(full_report())
    ids = re.findall(r'<svg.*?\bid="([^"]+)"', page, re.DOTALL)
    assert len(set(ids)) == len(ids)


@pytest.mark.slow
def test_page_is_repeatable() -> None:
    assert render_report(full_report()) == render_report(full_report())


@pytest.mark.slow
def test_every_key_may_be_absent() -> None:
    assert "<h1>Ghosted model</h1>" in render_report({})
    for key in full_report():
        shorter = full_report()
        del shorter[key]
        assert "</html>" in render_report(shorter, "A title")


@pytest.mark.slow
def test_write(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    assert write_report(path, full_report()) == path
    assert path.read_text(encoding="utf-8") == render_report(full_report())
    with pytest.raises(ArgumentError, match="expected a new file for the report"):
        write_report(path, {})
    write_report(path, {}, "Other", overwrite=True)
    assert "Other" in path.read_text(encoding="utf-8")
    assert list(path.parent.iterdir()) == [path]


def test_write_json(tmp_path: Path) -> None:
    path = write_report(tmp_path / "report.json", full_report())
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(full_report()))


def test_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(tmp_path / "report.json", {"a": 1})
    monkeypatch.setattr(report_module.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError()))
    with pytest.raises(OSError):
        write_report(path, {"a": 2}, overwrite=True)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"needs jinja2: pip install 'ghosted_fast\[report"):
        render_report({})


def test_ratio_is_to_the_dense_model_of_the_same_dtype() -> None:
    rows = [row("dense", "bfloat16", 10.0), row("dense", "float32", 20.0)]
    rows += [row("ghosted", "float32", 30.0, dense=20.0)]
    rows += [{**row("x", "float32", 1.0), "throughput": None}, row("alone", "float32", 1.0)]
    found = ratio(rows[2], rows, "decode")
    assert found is not None and found.value == pytest.approx(1.5)
    assert [ratio(rows[index], rows, "decode") for index in (0, 1, 3, 4)] == [None] * 4


def test_compare_models() -> None:
    models = {"dense": tiny_model("llama", 3), "small": tiny_model("llama", 2)}
    rows = compare_models(models, iter([random_tokens(2, 9)]), {"prompt_length": 8, "seconds": 0.1})
    assert [(item.name, item.dtype, item.layers) for item in rows] == [
        ("dense", "float32", 3),
        ("small", "float32", 2),
    ]
    assert rows[0].parameters == sum(p.numel() for p in models["dense"].parameters())
    assert all(item.perplexity and item.throughput for item in rows)
    assert compare_models(models)[0].perplexity is None


def test_sentences_have_spaces_between_them() -> None:
    report = full_report()
    step = {"before": 0.5, "after": 0.4, "accepted": True}
    page = render_report({**report, "corrections": [step] * 6})
    said = " ".join(re.sub("<[^>]*>", "", page).split())
    assert "nothing was trained. 6 corrections of the ghosts" in said


def test_columns_that_were_not_measured_are_left_out() -> None:
    report = full_report()
    page = render_report(report)
    assert "prefill, tok/s" in page and "<th>perplexity</th>" in page
    for row in report["models"]:
        row["throughput"] = None
    page = render_report(report)
    assert "tok/s" not in page and "to dense" not in page and "<th>perplexity</th>" in page
    for row in report["models"]:
        row["perplexity"] = None
    assert "<th>perplexity</th>" not in render_report(report)


def test_answers_stand_side_by_side_and_what_comes_next_is_said() -> None:
    report = {**full_report(), "output": "my model"}
    report["samples"] = [
        {"name": name, "prompt": prompt, "text": f"{name} says"}
        for prompt in ("Why?", "When?")
        for name in ("dense", "pruned", "ghosted")
    ]
    page = render_report(report)
    assert page.count('<div class="answers">') == 2 and page.count("<figcaption>") == 6
    assert "<dt>choosing the layers</dt><dd>60.0 s</dd>" in page
    assert (
        "<dt>for llama.cpp</dt><dd><code>ghosted-fast export &#39;my model&#39; --to gguf" in page
    )
    assert "What to do next" not in render_report(full_report())
    balance = Balance()
    balance.feed(page)
    assert "src=" not in page and "http" not in re.sub(r'xmlns[^"]*"[^"]*"|"http[^"]*"', "", page)
