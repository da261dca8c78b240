"""`fit` and `select` of a model that stays in its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_gguf import write_gguf_model
from support.tiny_text import TEXT, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ghosted_fast.checkpoint.recipe import read_recipe
from ghosted_fast.cli._shared import loading
from ghosted_fast.cli.app import app
from ghosted_fast.fit.sweep import plan
from ghosted_fast.models.unloaded.files import StoredTensor
from ghosted_fast.swept import asked, run

SMALL = ("--tokens", 512, "--sequence-length", 32, "--batch-size", 4)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def given(tmp_path: Path) -> tuple[object, ...]:
    save_tiny_model(tmp_path / "dense", num_layers=20)
    (tmp_path / "text.txt").write_text((TEXT + "\n\n") * 60)
    return ("--model", tmp_path / "dense", "--calibration", tmp_path / "text.txt", *SMALL)


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """Options that a tiny model does not fit in: the program itself is taken to be small."""
    monkeypatch.setattr(plan, "PROGRAM_BYTES", 0)
    return ("--memory", "700kB")


def test_fit_sweeps_where_memory_is_short_and_says_so(
    tmp_path: Path, given: tuple[object, ...], little: tuple[object, ...]
) -> None:
    asked = ("fit", *given, "--remove", 2, "--corrections", 0)
    loaded = invoke(*asked, "--output", tmp_path / "loaded", "--json")
    assert loaded.exit_code == 0, loaded.output
    swept = invoke(*asked, "--output", tmp_path / "swept", *little, "--json")
    assert swept.exit_code == 0, swept.output
    mine, theirs = json.loads(swept.stdout), json.loads(loaded.stdout)
    assert mine["swept"]
    assert mine["removed"] == theirs["removed"]
    assert mine["ghosts"] == theirs["ghosts"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "swept").config.num_hidden_layers == 18
    AutoTokenizer.from_pretrained(tmp_path / "swept")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"dense", "text.txt", "loaded", "swept"}, "no states are left"
    kept = [read_recipe(tmp_path / name) for name in ("loaded", "swept")]
    assert kept[0]["made"] == kept[1]["made"]
    assert kept[1]["fit"] == kept[0]["fit"] | {"memory": "700000"}


def test_a_bound_is_kept_in_a_sweep_too(
    tmp_path: Path, given: tuple[object, ...], little: tuple[object, ...]
) -> None:
    asked = ("fit", *given, "--max-perplexity-increase", "1%")
    asked = (*asked, "--criterion", "streamline", "--corrections", 0, "--json")
    found = {}
    for name, more in (("loaded", ()), ("swept", little)):
        result = invoke(*asked, "--output", tmp_path / name, *more)
        assert result.exit_code == 0, result.output
        found[name] = json.loads(result.stdout)
    mine, theirs = found["swept"], found["loaded"]
    assert mine["swept"] and "swept" not in theirs
    assert mine["removed"] == theirs["removed"]
    assert [t["remove"] for t in mine["budget"]["tried"]] == [
        t["remove"] for t in theirs["budget"]["tried"]
    ]
    assert len(mine["budget"]["tried"]) > 2
    layers = AutoModelForCausalLM.from_pretrained(tmp_path / "swept").config.num_hidden_layers
    assert layers == 20 - mine["budget"]["remove"]
    assert not (tmp_path / "swept.states").exists()


def test_a_gguf_file_is_swept_too(
    tmp_path: Path, given: tuple[object, ...], little: tuple[object, ...]
) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    write_gguf_model(tmp_path / "a.gguf", 6, "Q8_0")
    asked = ("fit", "--model", tmp_path / "a.gguf", *given[2:], "--remove", 2, "--corrections", 0)
    planned = json.loads(invoke(*asked, "--dry-run", "--json").stdout)
    less = ("--memory", planned["resident_bytes"] - 1)
    found = {}
    for name, memory in (("loaded", ()), ("swept", less)):
        result = invoke(*asked, "--output", tmp_path / name, *memory, "--json")
        assert result.exit_code == 0, result.output
        found[name] = json.loads(result.stdout)
    assert found["swept"]["swept"]
    assert found["swept"]["removed"] == found["loaded"]["removed"]
    assert found["swept"]["ghosts"] == found["loaded"]["ghosts"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "swept").config.num_hidden_layers == 4
    ids = [AutoTokenizer.from_pretrained(tmp_path / n)("the")["input_ids"] for n in found]
    assert ids[0] == ids[1]


def test_select_sweeps_too(given: tuple[object, ...], little: tuple[object, ...]) -> None:
    asked = ("select", *given, "--remove", 2, "--criterion", "streamline", "--json")
    loaded, swept = invoke(*asked), invoke(*asked, *little)
    assert swept.exit_code == 0, swept.output
    assert json.loads(swept.stdout) == json.loads(loaded.stdout)


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (("--criterion", "taylor"), 1, "which needs all layers at once"),
        (("--corrections", 2), 1, "make no corrections (corrections=0, --corrections 0)"),
        (("--heal", "1k"), 1, "expected heal=None"),
        (("--evaluation", "{text}"), 2, "expected no text to measure on"),
        (("--calibration", "self"), 2, "got 'self'"),
        (("--memory", "1kB"), 1, "of memory to sweep through this model"),
        (("--memory", "much"), 2, "expected a size such as '7GB'"),
    ],
)
def test_what_a_sweep_cannot_do_is_refused(
    tmp_path: Path,
    given: tuple[object, ...],
    little: tuple[object, ...],
    more: tuple[object, ...],
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(StoredTensor, "read")
    more = tuple(str(item).format(text=tmp_path / "text.txt") for item in more)
    result = invoke("fit", *given, "--remove", 2, "--output", tmp_path / "out", *little, *more,
                    *(("--evaluation-tokens", 64) if "--evaluation" in more else ()))  # fmt: skip
    assert result.exit_code == status, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_dry_run_reads_no_weight_and_says_what_it_would_take(
    given: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(StoredTensor, "read")
    for verb in ("fit", "select"):
        result = invoke(verb, *given, "--remove", 2, "--dry-run")
        assert result.exit_code == 0, result.output
        for words in ("of statistics for all", "with the model in it", "swept through layer by",
                      "GB of disk", "GB of reads", "about 0 minutes"):  # fmt: skip
            assert words in " ".join(result.stdout.split())
    facts = json.loads(invoke("fit", *given, "--remove", 2, "--dry-run", "--json").stdout)
    assert facts["sweep"]["disk_bytes"] == 0
    assert facts["sweep"]["read_bytes"] > 20 * 9000 * 4
    bounded = ("fit", *given, "--max-perplexity-increase", "10%", "--dry-run")
    result = invoke(*bounded)
    assert result.exit_code == 0, result.output
    # 1, 2, 4, 8, 16, and three between 8 and 16
    assert "8 numbers of layers tried" in " ".join(result.stdout.split())
    more = json.loads(invoke(*bounded, "--json").stdout)
    assert more["sweep"]["numbers_tried"] == 8
    assert more["sweep"]["read_bytes"] > 2 * facts["sweep"]["read_bytes"]
    assert more["statistics_bytes"] == 20 * (facts["statistics_bytes"] // 19)
    refused = invoke("fit", *given, "--remove", 2, "--criterion", "sleb", "--dry-run")
    assert "no sweep: expected a criterion" in " ".join(refused.stdout.split())


def test_a_dry_run_names_the_memory_of_a_gpu_and_of_the_host(
    given: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (loading, asked):
        monkeypatch.setattr(module, "device_named", torch.device)
    monkeypatch.setattr(asked, "free_memory", lambda _: 10**11)
    monkeypatch.setattr(plan, "operations_per_second", lambda *_: 1e12)
    words = ("fit", *given, "--remove", 2, "--dry-run", "--device", "cuda:0")
    shown = " ".join(invoke(*words).stdout.split())
    assert "0.6 GB of the memory of cuda:0 with the model in it" in shown
    assert "layer by layer: 0.6 GB of the GPU's memory, 0.6 GB of memory, 0.0 GB of disk" in shown
    assert "about 0 minutes of computing" in shown
    facts = json.loads(invoke(*words, "--json").stdout)["sweep"]
    assert min(facts["device_bytes"], facts["memory_bytes"]) > plan.PROGRAM_BYTES
    short = " ".join(invoke(*words, "--memory", "1MB").stdout.split())
    assert "no sweep: expected at least 0.6 GB of the device's memory" in short


def test_states_go_beside_the_output_and_a_stopped_run_goes_on(
    tmp_path: Path,
    given: tuple[object, ...],
    little: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ("fit", *given, "--remove", 2, "--output", tmp_path / "out", *little)
    original = run._fit

    def fails(*_: Any) -> Any:
        raise RuntimeError("the power is gone")

    monkeypatch.setattr(run, "_fit", fails)
    assert "the power is gone" in invoke(*asked).stderr
    assert (tmp_path / "out.states" / "sweep.json").is_file()
    monkeypatch.setattr(run, "_fit", original)
    result = invoke(*asked)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out.states").exists()
