"""Every verb from end to end, on a tiny model folder."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_text import save_tiny_model
from typer.testing import CliRunner

from ghosted_fast.cli.app import app
from ghosted_fast.measure.speed import Run
from ghosted_fast.models.families import num_layers
from ghosted_fast.models.loading import load_model
from ghosted_fast.selection.criteria import CRITERIA

SMALL = ["--tokens", "512", "--sequence-length", "32"]


def run(*arguments: object) -> str:
    """Run the command line, expect success, and return its stdout."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json"))


@pytest.mark.slow
@pytest.mark.parametrize("criterion", CRITERIA)
def test_select(model_folder: Path, texts: Path, criterion: str) -> None:
    command = ["select", "--model", model_folder, "--calibration", texts, "--remove", 2]
    found = run_json(*command, "--criterion", criterion, *SMALL)
    assert len(found["removed"]) == 2
    assert found["criterion"] == criterion
    assert {"start", "stop", "score"} <= found["scores"][0].keys()


@pytest.mark.slow
def test_eval_measures_likeness(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", seed=1)
    command = ["eval", "--model", model_folder, "--model", other, "--fidelity", "--new-tokens", 4]
    found = run_json(*command, "--prompts", texts, "--report", tmp_path / "page.html")
    dense, changed = found["models"]
    assert dense["fidelity"]["agreement"] == dense["fidelity"]["never_parts"] == 1.0
    assert dense["fidelity"]["divergence"] == 0.0 and dense["fidelity"]["parts_after"] is None
    assert changed["fidelity"]["agreement"] < 1.0 and changed["fidelity"]["divergence"] > 0.0
    assert changed["fidelity"]["num_prompts"] == 64 and changed["fidelity"]["num_tokens"] == 256
    assert changed["exact_answers"][0]["kind"] == "copying"
    assert "Likeness to tiny" in (tmp_path / "page.html").read_text(encoding="utf-8")
    shown = run(*command, "--report", tmp_path / "page.json")
    assert "On the answers of tiny: 32 prompts, 128 tokens" in shown
    assert "tokens until they part (median)" in shown and "Answers written exactly, %" in shown
    kept = json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))
    assert kept["models"][1]["fidelity"]["num_prompts"] == 32 and kept["machine"]
    again = CliRunner().invoke(app, [*map(str, command), "--report", str(tmp_path / "page.json")])
    assert again.exit_code == 1 and "exists" in again.output


def test_select_shows_the_scores(model_folder: Path, texts: Path) -> None:
    command = ["select", "--model", model_folder, "--calibration", texts, "--remove", 5]
    shown = run(*command, "--criterion", "streamline", *SMALL).splitlines()
    assert shown[0].split() == ["layers", "score"]
    assert shown[1].split()[0] in ("0-4", "1-5") and shown[1].rstrip().endswith("removed")
    assert shown[-1] == f"remove {shown[1].split()[0]}"


def test_select_dry_run(model_folder: Path, texts: Path) -> None:
    command = ["select", "--model", model_folder, "--calibration", texts, "--remove", 2]
    needed = run_json(*command, "--dry-run")["statistics_bytes"]
    assert needed > 5 * 8 * 32 * 32
    assert f"{needed} bytes" in run(*command, "--dry-run")


def test_fit_shows_where_the_time_went(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    command = ["fit", "--model", model_folder, "--calibration", texts, "--remove", 2, *SMALL]
    command += ["--corrections", 1, "--heal", "64"]
    found = run_json(*command, "--output", tmp_path / "one")
    assert set(found["spans"]) > {"select/pass/sums", "select/scoring", "correct/gradients", "heal"}
    for name in ("select", "correct"):
        # The entry is timed around the span.
        assert 0.0 < found["spans"][name]["seconds"] <= found["seconds"][name]
    shown = run(*command, "--output", tmp_path / "other", "--profile")
    assert "where the time went" in shown and "(the rest)" in shown
    saved = json.loads((tmp_path / "one" / "config.json").read_text())
    assert "spans" not in json.dumps(saved), "times of a run are no part of a model"


@pytest.mark.slow
def test_fit_saves_a_model_and_a_report(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    output, page = tmp_path / "ghosted", tmp_path / "report.html"
    command = ["fit", "--model", model_folder, "--calibration", texts, "--removed", "2-3"]
    command += ["--output", output, "--evaluation", texts, "--evaluation-tokens", "256"]
    found = run_json(*command, "--report", page, *SMALL)
    assert found["removed"] == [2, 3]
    assert found["ghosts"][0]["start"] == 2
    assert [row["name"] for row in found["models"]] == ["dense", "pruned", "ghosted"]
    assert [row["layers"] for row in found["models"]] == [6, 4, 4]
    assert found["models"][2]["perplexity"]["value"] > 1
    assert "</html>" in page.read_text(encoding="utf-8")
    model, tokenizer = load_model(output)
    assert num_layers(model) == 4
    assert tokenizer.bos_token_id == 1
    evaluated = run_json("eval", "--model", output, "--evaluation", texts, "--tokens", "256",
                         "--sequence-length", "32")  # fmt: skip
    assert evaluated["models"][0]["perplexity"] == found["models"][2]["perplexity"]


def test_fit_with_every_option(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "ghosted"
    shown = run(
        "fit", "--model", model_folder, "--calibration", texts, "--remove", 1, "--output",
        output, "--criterion", "streamline", "--features", "raw", "--bias", "--first-state", "on",
        "--token-weight", "uniform", "--damping", "0.01", "--batch-size", "4", "--dtype", "bf16",
        "--device", "cpu", "--seed", "3", "--threads", torch.get_num_threads(), "--field", "text",
        "--report", tmp_path / "report.json", *SMALL,
    )  # fmt: skip
    assert f"saved {output}" in shown
    ghost = json.loads((tmp_path / "report.json").read_text())["ghosts"][0]
    assert ghost["features"] == "raw"
    assert ghost["bias"] is True
    assert ghost["first_state"] is True
    assert ghost["damping"] == 0.01
    assert load_model(output)[0].dtype == torch.bfloat16


def test_fit_without_recovery(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    command = ["fit", "--model", model_folder, "--calibration", texts, "--recovery", "none"]
    command += ["--remove", 2, "--criterion", "shortgpt", *SMALL]
    found = run_json(*command, "--output", tmp_path / "pruned", "--evaluation", texts,
                     "--evaluation-tokens", "256")  # fmt: skip
    assert [row["name"] for row in found["models"]] == ["dense", "pruned"]
    assert num_layers(load_model(tmp_path / "pruned")[0]) == 4


def test_fit_with_a_published_recovery(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    command = ["fit", "--model", model_folder, "--calibration", texts, "--recovery", "replaceme"]
    found = run_json(*command, "--removed", "3", "--output", tmp_path / "folded", *SMALL,
                     "--evaluation", texts, "--evaluation-tokens", "256")  # fmt: skip
    assert [row["name"] for row in found["models"]] == ["dense", "pruned", "replaceme"]
    assert found["recovery"] == "replaceme" and found["ghosts"] == []
    pruned, folded = found["models"][1:]
    assert folded["parameters"] == pruned["parameters"]
    assert folded["perplexity"] != pruned["perplexity"]


@pytest.mark.slow
def test_fit_on_text_of_its_own(model_folder: Path, tmp_path: Path) -> None:
    found = run_json("fit", "--model", model_folder, "--calibration", "self", "--removed", "3",
                     "--output", tmp_path / "ghosted", "--tokens", "256",
                     "--sequence-length", "32")  # fmt: skip
    assert found["ghosts"][0]["num_tokens"] <= 256


def test_fit_dry_run_writes_nothing(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    command = ["fit", "--model", model_folder, "--calibration", texts, "--removed", "1,3-4"]
    found = run_json(*command, "--dry-run", "--output", tmp_path / "ghosted")
    assert found["statistics_bytes"] > 2 * 8 * 32 * 32
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_fit_overwrites_when_asked(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "ghosted"
    command = ["fit", "--model", model_folder, "--calibration", texts, "--output", output, *SMALL]
    run(*command, "--removed", "3")
    run(*command, "--removed", "2,4", "--overwrite")
    assert num_layers(load_model(output)[0]) == 4


def test_eval_compares_models(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", num_layers=2, seed=1)
    command = ["eval", "--model", model_folder, "--model", other, "--evaluation", texts]
    command += ["--tokens", "256", "--sequence-length", "32"]
    found = run_json(*command)
    assert [(row["name"], row["layers"]) for row in found["models"]] == [("tiny", 6), ("other", 2)]
    shown = run(*command)
    assert f"{found['models'][1]['perplexity']['value']:.2f}" in shown


@pytest.mark.slow
def test_grid_goes_on_where_it_was(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(["a bird saw the dog and the cat sat on it ."] * 60))
    command = ["grid", "--model", model_folder, "--calibration", texts, "--evaluation", texts]
    command += ["--evaluation", other, "--evaluation-tokens", 256, *SMALL, "--remove", "1,3"]
    command += ["--output", tmp_path / "grid", "--criterion", "streamline"]
    run(*command, "--recovery", "none", "--remove", 2)
    state = (tmp_path / "grid" / "state.jsonl").read_text()
    command += ["--corrections", 1]
    found = run_json(*command, "--recovery", "none", "--recovery", "ghost")
    assert [(row["remove"], row["recovery"]) for row in found["rows"]] == [
        (count, name) for count in (1, 3) for name in ("none", "ghost", "ghost + 1 corrections")
    ]
    assert list(found["rows"][0]["perplexity"]) == ["texts", "other"]
    assert (tmp_path / "grid" / "state.jsonl").read_text().startswith(state)
    shown = run(*command, "--recovery", "ghost")
    assert "streamline" in shown and str(tmp_path / "grid" / "index.html") in shown
    written = json.loads((tmp_path / "grid" / "results.json").read_text())
    assert {row["recovery"] for row in written["rows"]} == {"ghost", "ghost + 1 corrections"}


def test_bench(model_folder: Path) -> None:
    command = ["bench", "--model", model_folder, "--prompt-length", "8", "--new-tokens", "2"]
    command += ["--seconds", "0.2"]
    found = run_json(*command, "--batch-size", "2", "--precision", "5%")
    speed = found["models"][0]["throughput"]
    assert 0 < speed["prefill_tokens_per_s"]["low"] <= speed["prefill_tokens_per_s"]["value"]
    assert speed["settings"]["precision"] == 0.05
    assert "processor" in found["machine"]
    shown = run(*command, "--batch-size", "1", "--batch-size", "3", "--prompt-length", "6")
    for length in (8, 6):
        for size in (1, 3):
            assert f"prompts of {length}, 2 new tokens, batch {size}" in shown
    assert shown.count("first token ms") == 4


def test_bench_of_two_names(model_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    command = ["bench", "--model", model_folder, "--model", other, "--prompt-length", "8"]
    found = run_json(*command, "--new-tokens", "2", "--seconds", "0.2")["models"]
    assert set(found[1]["throughput"]["relative"]) == {found[0]["name"]}
    shown = run(*command, "--new-tokens", "2", "--seconds", "0.2")
    assert re.search(r"not told apart|\dx", shown)


@pytest.mark.parametrize("when", ["while it is measured", "before anything of it is known"])
def test_ctrl_c_ends_bench_with_what_is_known(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    method = "decode" if when == "while it is measured" else "warm_up"
    pairs: list[int] = []
    work = getattr(Run, method)

    def interrupted(self: Run, *arguments: int) -> float:
        if self._settings.batch_size == 2:
            pairs.append(1)
            if method == "warm_up" or len(pairs) > 4:
                raise KeyboardInterrupt
        return float(work(self, *arguments))

    monkeypatch.setattr(Run, method, interrupted)
    command = ["bench", "--model", model_folder, "--prompt-length", "8", "--new-tokens", "4"]
    command += ["--seconds", "0.2", *[word for size in "123" for word in ("--batch-size", size)]]
    result = CliRunner().invoke(app, [str(argument) for argument in [*command, "--json"]])
    assert result.exit_code == 130
    found = [row["throughput"] for row in json.loads(result.stdout)["models"]]
    known = [(item["settings"]["batch_size"], item["ended"] == "interrupted") for item in found]
    assert known == ([(1, False), (2, True)] if method == "decode" else [(1, False)])


def test_doctor() -> None:
    found = run_json("doctor")
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert {item["name"] for item in found["backends"]} >= {"native", "reference"}
    assert "llama" in found["families"]
    shown = run("doctor")
    assert "reference" in shown
    for cell in found["ghosts"]:
        assert {*cell} == {"dtype", "hidden_size", "rows", "weight", "lying"}
        assert re.search(
            r"^" + r" +".join(map(re.escape, cell.values())) + r"\s*$", shown, re.MULTILINE
        )
    is_there = next(item["available"] for item in found["backends"] if item["name"] == "native")
    dtypes = [cell["dtype"] for cell in found["ghosts"]]
    assert set(dtypes) == ({"bfloat16", "float16", "float32"} if is_there else set())
