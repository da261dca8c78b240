"""Several texts to learn from, on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from support.tiny_text import TEXT
from typer.testing import CliRunner

from ghosted_fast.checkpoint.recipe import RECIPE
from ghosted_fast.cli._shared.input_args import LearnedTextArgs
from ghosted_fast.cli._shared.values import parse_mixture
from ghosted_fast.cli.app import app
from ghosted_fast.models.loading import load_model
from ghosted_fast.text import generation
from ghosted_fast.text.generation import generate_texts
from ghosted_fast.text.loading import token_batches
from ghosted_fast.text.mixture import Texts, mix_texts

SMALL = ("--tokens", 512, "--sequence-length", 32)


def run(*arguments: object, status: int = 0) -> str:
    """Run the command line, expect a status, and return what it says."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "other.txt"
    path.write_text("a bird saw the dog and the cat sang on the mat . " * 200)
    return path


@pytest.mark.parametrize(
    ("texts", "shares"),
    [
        (["a"], {"a": 1.0}),
        (["a", "self"], {"a": 0.5, "self": 0.5}),
        (["a.jsonl:70%", "self:30%"], {"a.jsonl": 0.7, "self": 0.3}),
        (["a:.25", "b/c:d:0.75"], {"a": 0.25, "b/c:d": 0.75}),
        (["a:33.3%", "b:33.3%", "c:33.3%"], dict.fromkeys("abc", 1 / 3)),
        (["nobody/wiki:20231101"], {"nobody/wiki:20231101": 1.0}),
        (["nobody/wiki:1"], {"nobody/wiki:1": 1.0}),
        (["nobody/wiki:en:60%", "a:40%"], {"nobody/wiki:en": 0.6, "a": 0.4}),
    ],
)
def test_texts_and_their_shares(texts: list[str], shares: dict[str, float]) -> None:
    assert parse_mixture(texts) == pytest.approx(shares)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", "a"], "expected different texts, got 'a' twice"),
        (["a:70%", "a:30%"], "expected different texts, got 'a' twice"),
        (["a:70%", "self"], "of each text or of none, such as 'self:30%', got none of 'self'"),
        (["a:70%", "self:20%"], "add up to 100%, got 70% [+] 20%"),
        (["a:100%", "self:0%"], "above 0 that add up to 100%, got 100% [+] 0%"),
        (["a:50%"], "add up to 100%, got 50%"),
        (["a:0.7", "self:30"], "a share such as '70%' or '0.7' of 'self', got '30'"),
        (["self:1"], "a share such as '70%' or '0.7' of 'self', got '1'"),
    ],
)
def test_shares_that_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        parse_mixture(texts)
    given = [f"--calibration={text}" for text in texts]
    for verb in (("fit", "--removed=1", "--output=o"), ("select", "--remove=1", "--dry-run")):
        assert "'--calibration': expected" in run(*verb, "--model=m", *given, status=2)


def test_a_number_behind_a_file_is_no_configuration(texts: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"or '0.7' of .*texts\.jsonl', got '70'"):
        parse_mixture([f"{texts}:70"])


@pytest.mark.parametrize("verb", ["fit", "select", "grid", "heal"])
def test_each_text_is_looked_for_before_a_model_is_loaded(verb: str, texts: Path) -> None:
    rest = {
        "fit": ("--model=./no", "--removed=1", "--output=o"),
        "select": ("--model=./no", "--remove=1"),
        "grid": ("--model=./no", "--remove=1", "--output=o", "--evaluation", texts),
        "heal": ("./no", "--dense=./none", "--output=o"),
    }[verb]
    both = "--calibration", texts, "--calibration", "nowhere.jsonl"
    assert "there is no file 'nowhere.jsonl'" in run(verb, *rest, *both, status=1)


def test_fit_on_a_mixture_and_its_recipe(
    model_folder: Path, texts: Path, other: Path, tmp_path: Path
) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    both = "--calibration", f"{texts}:75%", "--calibration", f"{other}:25%"
    command = ["fit", "--model", model_folder, "--removed", "2", "--corrections", 0]
    found = json.loads(run(*command, *SMALL, *both, "--output", first, "--json"))
    assert found["calibration"] == "texts.jsonl (75%), other.txt (25%)"
    kept = yaml.safe_load((first / RECIPE).read_text())
    assert kept["fit"]["calibration"] == [f"{texts}:75%", f"{other}:25%"]
    run("fit", "--recipe", first / RECIPE, "--output", again)
    alone = json.loads(run(*command, *SMALL, "--calibration", texts, "--output",
                           tmp_path / "alone", "--json"))  # fmt: skip
    assert alone["calibration"] == "texts.jsonl"
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (first / weights).read_bytes()
    assert (tmp_path / "alone" / weights).read_bytes() != (first / weights).read_bytes()


def test_what_is_read_is_never_replaced(model_folder: Path, texts: Path, other: Path) -> None:
    both = "--calibration", f"{texts}:50%", "--calibration", f"{other}:50%"
    for verb in (
        ("fit", "--model", model_folder, "--removed", 2),
        ("heal", model_folder, "--dense", model_folder),
    ):
        said = run(*verb, *both, "--output", other, "--overwrite", status=1)
        assert str(other) in said and other.is_file()


def test_a_text_that_ends_early_is_named(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(TEXT)
    said = run("select", "--model", model_folder, "--remove", 1, *SMALL, "--calibration", texts,
               "--calibration", short, status=1)  # fmt: skip
    there = len(TEXT.split())
    assert f"the text '{short}' ended after {there} of 256 tokens; give more of it" in said


def test_what_the_model_writes_is_mixed_in(model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(model_folder)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "cat", "said": TEXT}) + "\n" for _ in range(90)))
    text: Any = LearnedTextArgs(
        calibration=[f"{texts}:75%", "self:25%"], field="said", sequence_length=32, seed=3
    )
    read = torch.cat(text.read(model, tokenizer, 512, progress=False))
    rows = read.tolist()
    own = generate_texts(model, tokenizer, 128, seed=3)
    written = torch.cat(token_batches(tokenizer, own, 128, 32)).tolist()
    assert len(rows) == 16 and [row for row in rows if row in written] == written
    assert text.from_model and text.named == "texts.jsonl (75%), self (25%)"
    sources: dict[str, Texts] = {
        "web": [TEXT] * 90,
        "own": lambda wanted: generate_texts(model, tokenizer, wanted, seed=3),
    }
    shares = {"web": 0.75, "own": 0.25}
    assert torch.equal(read, torch.cat(mix_texts(tokenizer, sources, 512, shares, 32, seed=3)))


def test_it_is_written_at_several_temperatures(model_folder: Path) -> None:
    model, tokenizer = load_model(model_folder)
    found = {}
    for given in (None, (0.5, 2.0)):
        text: Any = LearnedTextArgs(
            calibration=["self"], temperatures=given, sequence_length=32, seed=3
        )
        found[given] = torch.cat(text.read(model, tokenizer, 256, progress=False))
        own = generate_texts(model, tokenizer, 256, temperatures=given or (1.0,), seed=3)
        assert torch.equal(found[given], torch.cat(token_batches(tokenizer, own, 256, 32)))
    assert not torch.equal(found[None], found[0.5, 2.0])


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("asked", "given"), [("0.5, 2,1.25", (0.5, 2.0, 1.25)), (None, None)])
def test_the_temperatures_of_the_command_line_are_those_it_is_written_at(
    model_folder: Path,
    texts: Path,
    asked: str | None,
    given: tuple[float, ...] | None,
    mixed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def noted(*args: Any, **options: Any) -> Any:
        seen.append(options.get("temperatures"))
        return generate_texts(*args, **options)

    monkeypatch.setattr(generation, "generate_texts", noted)
    command = ["select", "--model", model_folder, "--remove", 1, "--criterion", "shortgpt", *SMALL]
    command += ["--calibration", "self", *(["--calibration", texts] if mixed else [])]
    run(*command, *(["--temperatures", asked] if asked else []))
    assert seen == [given]


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["heal", "grid"])
def test_other_verbs_take_mixtures(
    verb: str, model_folder: Path, texts: Path, other: Path, tmp_path: Path
) -> None:
    both = ["--calibration", texts, "--calibration", other, "--sequence-length", 32]
    if verb == "heal":
        run("prune", "--model", model_folder, "--removed", 2, "--output", tmp_path / "pruned")
        command = [verb, tmp_path / "pruned", "--dense", model_folder, "--tokens", 2000]
    else:
        command = [verb, "--model", model_folder, "--remove", 1, "--evaluation", other,
                   "--evaluation-tokens", 256, "--criterion", "shortgpt", "--recovery", "none",
                   "--tokens", 512]  # fmt: skip
    assert json.loads(run(*command, *both, "--output", tmp_path / "out", "--json"))
