"""The model card: what it says, and that nobody's own is overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from support.dense_reference import NUM_LAYERS, REMOVED, random_ghosts
from transformers import AutoModelForCausalLM
from transformers.utils import hub

from ghosted_fast.checkpoint.model_card import (
    CARD,
    attach_healing,
    attach_report,
    model_card,
    write_card,
)
from ghosted_fast.checkpoint.recipe import attach_recipe
from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.options import GhostOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.surgery.transfer import take_ghosts
from ghosted_fast.testing import random_tokens, tiny_model

OWN = "# My model\n"


def ghosted() -> Any:
    return remove_layers(tiny_model("llama", NUM_LAYERS), REMOVED, random_ghosts())


def fitted() -> tuple[Any, Any]:
    dense = tiny_model("llama")
    dense.config._name_or_path = "someone/tiny-llama"
    batches = [random_tokens(8, 32, seed) for seed in range(2)]
    return ghost_model(dense, batches, removed=[2, 3], options=GhostOptions(bias=True))


def test_card_says_what_was_done(tmp_path: Path) -> None:
    model, report = fitted()
    folder = save_model(model, tmp_path / "model")
    card = ModelCard.load(folder / CARD)
    assert card.data.base_model == "someone/tiny-llama"
    assert card.data.library_name == "transformers"
    assert {"ghosted_fast", "ghosted_llama"} <= set(card.data.tags)
    assert "2 of the 6 decoder layers of someone/tiny-llama were removed: 2-3." in card.text
    (fact,) = report.ghosts
    first_state = "yes" if fact.first_state else "no"
    row = f"| 2-3 | behind layer 1 | normed | yes | {first_state} | as the model |"
    assert f"{row} {fact.damping:.1e} | {fact.held_out_error:.4f} |" in card.text
    assert f"over {fact.num_tokens:,} tokens" in card.text
    assert "trust_remote_code=True" in card.text and "import ghosted_fast" in card.text
    assert "## Measured" not in card.text
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    again = save_model(loaded, tmp_path / "again")
    assert (again / CARD).read_text() == (folder / CARD).read_text()


def test_card_shows_the_measured_table() -> None:
    model, report = fitted()
    row = {"name": "dense", "dtype": "bfloat16", "layers": 30, "parameters": 134_500_000}
    measured = {"perplexity": {"value": 28.481, "low": 1}, "throughput": None}
    speed = {"value": 2134.7, "low": 2101.0, "high": 2155.0, "samples": 20}
    speeds = {"prefill_tokens_per_s": speed, "decode_tokens_per_s": 42.61}
    rows = [row | measured, row | {"name": "ghosted", "perplexity": None, "throughput": speeds}]
    attach_report(model.config, {**report.to_dict(), "models": rows, "calibration": "web.jsonl"})
    text = model_card(model.config)
    assert "| dense | bfloat16 | 30 | 134.5 M | 28.48 | - | - |" in text
    assert "| ghosted | bfloat16 | 30 | 134.5 M | - | 2,130 | 42.6 |" in text
    assert "tokens of web.jsonl" in text


def test_gaps_are_found_without_a_report(tmp_path: Path) -> None:
    text = model_card(ghosted().config)
    for gap in ("| 0 | before layer 0", "| 2-3 | behind layer 0", "| 7 | behind"):
        assert gap in text
    assert "## Calibration" not in text and "base_model" not in text


HEALING = {
    "before": 0.4, "after": 0.3, "tokens": 98_304, "best_tokens": 98_304, "rank": 32, "maps": 28,
    "ghosts": 1, "trained_parameters": 5000, "curve": [], "ended": "tokens", "seconds": 300.0,
}  # fmt: skip


def test_card_says_what_was_trained() -> None:
    model, report = fitted()
    assert "Healing" not in model_card(model.config)
    measured = {"models": [{"name": "dense", "dtype": "x", "layers": 6, "parameters": 1}]}
    attach_report(model.config, report.to_dict() | measured | {"healing": HEALING})
    trained = "were trained on 98,304 tokens in 300 s"
    text = model_card(model.config)
    what = "the ghost and factors of rank 32 of 28 linear maps (5,000 numbers)"
    assert f"Healing: {what} {trained}" in text
    assert "0.4000 to 0.3000 nats. The factors are folded into the weights." in text
    assert attach_healing(model.config, HEALING | {"maps": 0}, "web.jsonl")
    text = model_card(model.config)
    assert text.count("Healing: ") == 2 and "The text was web.jsonl." in text
    assert "the ghost alone (5,000 numbers) was trained" in text
    assert "## Measured" not in text, "figures of the model before it was healed"
    assert not attach_healing(tiny_model("llama").config, HEALING)


def test_card_of_a_model_of_which_healing_alone_is_known() -> None:
    model = ghosted()
    attach_healing(model.config, HEALING)
    text = model_card(model.config)
    assert "Healing: " in text and "closed-form fit" not in text


def test_card_of_a_folder_that_was_refined_says_so() -> None:
    model, _ = fitted()
    model.config.ghost["report"]["refined"] = 48
    assert "They alone were then trained for 48 steps." in model_card(model.config)


def test_ghosts_of_a_healed_model_leave_its_other_weights_behind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, _ = fitted()
    caplog.clear()
    attach_healing(model.config, HEALING | {"maps": 0})
    assert take_ghosts(model).report == model.config.ghost["report"] and not caplog.text
    attach_healing(model.config, HEALING)
    report = take_ghosts(model).report
    assert report is not None and len(report["healed"]) == 1
    assert "which stay behind: heal the model that they are put into" in caplog.text


def test_local_paths_stay_private() -> None:
    model, report = fitted()
    attach_report(model.config, report.to_dict() | {"model": "/home/someone/secret/tiny"})
    text = model_card(model.config)
    assert "secret" not in text and "A ghosted tiny" in text


def test_report_goes_when_the_model_is_cut_again() -> None:
    model, _ = fitted()
    assert "report" in model.config.ghost
    assert "report" not in remove_layers(model, [0], [random_ghosts()[0]]).config.ghost


def test_own_card_is_kept(tmp_path: Path) -> None:
    model = ghosted()
    (tmp_path / CARD).write_text(OWN)
    model.save_pretrained(tmp_path)
    assert not write_card(model.config, tmp_path)
    assert (tmp_path / CARD).read_text() == OWN
    folder = save_model(model, tmp_path / "model")
    assert "ghosted_fast" in (folder / CARD).read_text()
    (folder / CARD).write_text(OWN)
    save_model(model, folder, overwrite=True)
    assert (folder / CARD).read_text() == OWN


@pytest.mark.parametrize("fails", [False, True])
def test_saving_keeps_an_own_card_to_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    model, card = ghosted(), tmp_path / CARD
    card.write_text(OWN)
    before = card.stat().st_mtime_ns

    def interrupted(*_: Any, **__: Any) -> None:
        card.write_text("what transformers puts there")
        raise OSError("no space left on device")

    if fails:
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", interrupted)
        with pytest.raises(OSError, match="no space left"):
            model.save_pretrained(tmp_path)
    else:
        model.save_pretrained(tmp_path)
    assert card.read_text() == OWN and card.stat().st_mtime_ns == before
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


class Hub:
    """Stands for the hub: keeps what is pushed."""

    def __init__(self) -> None:
        self.card: str | None = None
        self.pushed: dict[str, str] = {}
        self.header = b""

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        return type("Repository", (), {"repo_id": repo_id})

    def create_commit(self, operations: Any, **_: Any) -> str:
        for item in operations:
            path = Path(item.path_or_fileobj)
            is_weights = path.suffix == ".safetensors"
            if is_weights:
                self.header = path.read_bytes()[:8]
            self.pushed[item.path_in_repo] = "" if is_weights else path.read_text()
        return "done"


@pytest.fixture(params=[None, OWN], ids=["new_repository", "repository_with_card"])
def online(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub without a model card, or with somebody's own."""
    found, card = Hub(), request.param

    def placeholder(*_: Any, **__: Any) -> ModelCard:
        if card is not None:
            return ModelCard(card)
        text = "This model card has been automatically generated."
        return ModelCard.from_template(hub.ModelCardData(), model_description=text)

    monkeypatch.setattr(hub, "hf_api", lambda: found)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: found)
    monkeypatch.setattr(hub, "create_and_tag_model_card", placeholder)
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", placeholder)
    found.card = card
    return found


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_push_writes_the_card(tmp_path: Path, online: Hub, way: str) -> None:
    model = ghosted()
    if way == "push_to_hub":
        model.push_to_hub("someone/ghosted")
    else:
        model.save_pretrained(tmp_path / "ghosted", push_to_hub=True)
    assert {"modeling_ghosted.py", "config.json", "model.safetensors"} <= set(online.pushed)
    assert "digests.json" in online.pushed, "the configuration says that there are some"
    assert (8 + int.from_bytes(online.header, "little")) % 64 == 0  # see test_alignment.py
    if online.card is None:
        assert "4 of the 8 decoder layers" in online.pushed[CARD]
    else:
        assert OWN in online.pushed[CARD] and "removed" not in online.pushed[CARD]


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_push_takes_the_recipe_along(tmp_path: Path, online: Hub, way: str) -> None:
    model = ghosted()
    attach_recipe(model.config, {"recipe": 1, "fit": {"remove": 4}, "made": {}})
    if way == "push_to_hub":
        model.push_to_hub("someone/ghosted")
    else:
        model.save_pretrained(tmp_path / "ghosted", push_to_hub=True)
    assert online.pushed["recipe.yaml"].endswith("recipe: 1\nfit:\n  remove: 4\nmade: {}\n")


def test_push_of_a_folder_with_an_own_card(
    tmp_path: Path, online: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    model, local = ghosted(), "# Notes on this folder\n"
    (tmp_path / CARD).write_text(local)
    model.save_pretrained(tmp_path, push_to_hub=True)
    assert (tmp_path / CARD).read_text() == local
    if online.card is None:
        assert online.pushed[CARD] == local
    else:
        assert CARD not in online.pushed and "model.safetensors" in online.pushed
        assert "README.md and that in" in caplog.text and "both are kept" in caplog.text
    assert not [name for name in online.pushed if name.startswith(".")]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
