"""Healing from the command line: `fit --heal`, and `heal` of a saved folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.healed_models import same, weights
from support.tiny_text import TEXT, save_tiny_model
from typer.testing import CliRunner

from ghosted_fast.cli.app import app
from ghosted_fast.improve import healing
from ghosted_fast.models.families import num_layers
from ghosted_fast.models.loading import load_model
from ghosted_fast.options import HealOptions

LENGTH = ["--sequence-length", "32"]


def run(*arguments: object, status: int = 0) -> str:
    """Run the command line, expect a status, and return what it says."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make steps of few tokens, and judge on few, so that little text suffices."""
    given = {"tokens_per_step": 256, "held_out_tokens": 512}
    real = HealOptions.__init__

    def init(self: HealOptions, **options: Any) -> None:
        real(self, **{**given, **options})

    monkeypatch.setattr(HealOptions, "__init__", init)


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text in a random order, of which there is something to learn."""
    words, generator = TEXT.split(), torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("texts") / "long.txt"
    drawn = torch.randint(len(words), (8000,), generator=generator).tolist()
    path.write_text(" ".join(words[place] for place in drawn))
    return path


@pytest.fixture(scope="module")
def ghosted(model_folder: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("models") / "ghosted"
    run("fit", "--model", model_folder, "--calibration", texts, "--removed", "2-3", "--output",
        output, "--corrections", 0, "--tokens", "1024", *LENGTH)  # fmt: skip
    return output


@pytest.mark.slow
def test_fit_heals(model_folder: Path, long_text: Path, tmp_path: Path) -> None:
    output, page = tmp_path / "ghosted", tmp_path / "report.html"
    command = ["fit", "--model", model_folder, "--calibration", long_text, "--removed", "2-3",
               "--corrections", "1", "--tokens", "1056", *LENGTH]  # fmt: skip
    shown = run(*command, "--output", output, "--heal", "3k", "--report", page)
    assert "of 1 corrections: held-out divergence" in shown
    assert "healing: the ghost and factors of rank 32 of 28 linear maps" in shown
    assert sorted(item.name for item in tmp_path.iterdir()) == ["ghosted", "report.html"]
    written = page.read_text(encoding="utf-8")
    assert "nothing was trained" not in written and "numbers) were trained on 3,0" in written
    record = load_model(output)[0].config.ghost["report"]
    (healed,) = record["healed"]
    assert 2900 < healed["tokens"] < 3100 and record["num_tokens"] == 1056
    assert "were trained on 3,0" in (output / "README.md").read_text()
    plain = tmp_path / "plain"
    run(*command, "--output", plain)
    report = load_model(plain)[0].config.ghost["report"]
    assert report["ghosts"] == record["ghosts"], "healing changed the text of the fit"
    assert "healed" not in report


@pytest.mark.slow
def test_fit_heals_what_nothing_was_put_into(
    model_folder: Path, long_text: Path, tmp_path: Path
) -> None:
    found = json.loads(run(
        "fit", "--model", model_folder, "--calibration", long_text, "--removed", "2-3",
        "--recovery", "none", "--heal", "3k", "--output", tmp_path / "healed", "--tokens", "1024",
        "--evaluation", long_text, "--evaluation-tokens", "256", *LENGTH, "--json",
    ))  # fmt: skip
    assert [row["name"] for row in found["models"]] == ["dense", "pruned", "pruned, healed"]
    facts = found["healing"]
    assert facts["ghosts"] == 0 and facts["after"] < facts["before"]
    assert found["models"][1]["perplexity"] != found["models"][2]["perplexity"]


@pytest.mark.slow
def test_a_folder_is_healed(
    model_folder: Path, ghosted: Path, long_text: Path, tmp_path: Path
) -> None:
    output, page = tmp_path / "healed", tmp_path / "report.html"
    command = ["heal", ghosted, "--dense", model_folder, "--calibration", long_text, *LENGTH]
    command += ["--tokens", "4k", "--rank", 8, "--learning-rate", "3e-3"]
    found = json.loads(run(*command, "--output", output, "--report", page, "--json"))
    facts = found["healing"]
    assert facts["after"] < facts["before"] and facts["rank"] == 8 and facts["maps"] == 28
    assert found["removed"] == [2, 3] and found["num_layers"] == 6
    assert sorted(item.name for item in tmp_path.iterdir()) == ["healed", "report.html"]
    model, tokenizer = load_model(output)
    assert num_layers(model) == 4 and tokenizer.bos_token_id == 1
    before = load_model(ghosted)[0]
    assert not same(weights(before), weights(model))
    (kept,) = model.config.ghost["report"]["healed"]
    assert kept["calibration"] == "long.txt" and kept["tokens"] == facts["tokens"]
    assert model.config.ghost["report"]["ghosts"] == before.config.ghost["report"]["ghosts"]
    card = (output / "README.md").read_text()
    assert "Healing: the ghost and factors of rank 8 of 28 linear maps" in card
    assert "folded into the weights" in card and "The text was long.txt." in card
    written = page.read_text(encoding="utf-8")
    assert "<h2>Healing</h2>" in written and "tokens learned from" in written
    again = tmp_path / "again"
    assert "saved" in run("heal", output, *command[2:], "--output", again)
    assert len(load_model(again)[0].config.ghost["report"]["healed"]) == 2


@pytest.mark.slow
def test_a_killed_run_goes_on(
    model_folder: Path, ghosted: Path, long_text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    command = ["heal", ghosted, "--dense", model_folder, "--calibration", long_text, *LENGTH]
    command += ["--tokens", "4k", "--output"]
    run(*command, tmp_path / "whole")
    real, steps = healing.take_step, []

    def step(run_: Any, *rest: Any) -> None:
        steps.append(run_.step)
        if len(steps) == 9:
            raise OSError("the machine went away")
        real(run_, *rest)

    monkeypatch.setattr(healing, "take_step", step)
    assert "the machine went away" in run(*command, tmp_path / "healed", status=1)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["healed.heal", "whole"]
    run(*command, tmp_path / "healed")
    assert 0 < steps[9] <= 8
    assert sorted(item.name for item in tmp_path.iterdir()) == ["healed", "whole"]
    found, expected = (load_model(tmp_path / name)[0] for name in ("healed", "whole"))
    assert same(weights(found), weights(expected))


@pytest.mark.slow
def test_where_no_step_helps_the_folder_is_written_as_it_was(
    model_folder: Path, ghosted: Path, long_text: Path, tmp_path: Path
) -> None:
    command = ["heal", ghosted, "--dense", model_folder, "--calibration", long_text, *LENGTH]
    shown = run(*command, "--tokens", "2k", "--learning-rate", "50", "--output", tmp_path / "new")
    assert "no step helped, and nothing was changed" in shown and "new, unchanged" in shown
    before, after = (load_model(folder)[0] for folder in (ghosted, tmp_path / "new"))
    assert same(weights(before), weights(after))


@pytest.mark.slow
def test_on_text_of_the_dense_models_own(model_folder: Path, ghosted: Path, tmp_path: Path) -> None:
    found = json.loads(run(
        "heal", ghosted, "--dense", model_folder, "--calibration", "self", "--tokens", "600",
        "--minutes", "10", *LENGTH, "--output", tmp_path / "healed", "--json",
    ))  # fmt: skip
    assert found["calibration"] == "self" and 500 < found["healing"]["tokens"] < 700


@pytest.mark.slow
def test_what_does_not_fit_is_told_before_text_is_read(
    model_folder: Path, ghosted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*_: object, **__: object) -> None:
        raise AssertionError("the model wrote text")

    monkeypatch.setattr("ghosted_fast.text.generation.generate_texts", generate)
    rest = ["--calibration", "self", "--output", tmp_path / "new", "--sequence-length", 64]
    other = save_tiny_model(tmp_path / "other", seed=1)
    assert "of whose weights none is in the folder" in run(
        "heal", ghosted, "--dense", other, *rest, status=1
    )
    short = save_tiny_model(tmp_path / "short", num_layers=5)
    said = run("heal", ghosted, "--dense", short, *rest, status=1)
    assert "expected the dense model that the smaller one comes from (6 layers)" in said
    dense, _ = load_model(model_folder)
    dense.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    load_model(model_folder)[1].save_pretrained(tmp_path / "half")
    said = run("heal", ghosted, "--dense", tmp_path / "half", *rest, status=1)
    assert "expected both models in one dtype" in said
    taken = ["--calibration", "self", "--output", ghosted]
    said = run("heal", ghosted, "--dense", "./nowhere", *taken, status=1)
    assert "exists: name another, or pass --overwrite" in said
