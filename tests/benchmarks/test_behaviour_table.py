"""The table of accuracy and generation on a tiny model: rows, and what is not made twice."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.benchmark_module import load_benchmark
from support.tiny_text import TEXT, tiny_tokenizer

from ghosted_fast.assets.downloads import DemoAssets
from ghosted_fast.errors import ArgumentError
from ghosted_fast.measure import tasks
from ghosted_fast.measure.tasks import evaluate_tasks, with_flips
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.testing import tiny_model
from ghosted_fast.text.calibration_text import CalibrationText
from ghosted_fast.text.fingerprints import model_digest

pytestmark = pytest.mark.slow

TASK = "local/quartz"
MakeStudy = Callable[..., Any]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Return the program, on small texts and few questions."""
    pytest.importorskip("lm_eval", reason="no lm_eval: pip install 'ghosted_fast[lm-eval]'")
    draw, words = random.Random(0), TEXT.split()
    asked = [
        f"{' '.join(draw.choices(words, k=5))} {n}\n A: {draw.choice(words)}\n B: w{n}"
        for n in range(12)
    ]
    records = [{"input": [{"content": text}], "ideal": draw.choice("AB")} for text in asked]
    files = {"quartz": tmp_path / "quartz.jsonl"}
    files["quartz"].write_text("".join(f"{json.dumps(record)}\n" for record in records))
    calibration = tmp_path / "text.jsonl"
    texts = [" ".join(draw.choices(words, k=40)) for _ in range(400)]
    calibration.write_text("".join(f"{json.dumps({'0': text})}\n" for text in texts))
    module = load_benchmark("behaviour_table", monkeypatch)
    assets = DemoAssets(calibration, calibration, calibration)
    monkeypatch.setattr(module, "fetch_demo_assets", lambda: assets)
    monkeypatch.setattr(module, "QUESTIONS", module.QUESTIONS[:3])
    for name, value in (("CALIBRATION_TOKENS", 8192), ("LENGTH", 32), ("HEALED_TOKENS", 512)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "HELD_OUT_TOKENS", 256)
    for where in (module, tasks):
        monkeypatch.setattr(where, "fetch_questions", lambda: files)
    return module


@pytest.fixture
def study(bench: ModuleType, tmp_path: Path) -> MakeStudy:
    """Return what makes a study of one dense model in one file."""
    dense = tiny_model("llama", 6)
    scale = bench.Scale(questions=10, problems=2, new_tokens=6, tasks=(TASK,))

    def make(recovered: dict[str, Any] | None = None, **changed: Any) -> Any:
        asked = replace(scale, **changed)
        path = tmp_path / "behaviour.json"
        return bench.Study(path, "smollm2", dense, tiny_tokenizer(), asked, recovered)

    return make


def recovered(bench: ModuleType, made: Any) -> dict[str, Any]:
    """Return what the table of recoveries would hold for the study's model and text."""
    weights = model_digest(made._dense)
    text = CalibrationText.of(made._web_text(bench.CALIBRATION_TOKENS)).digest
    chosen = {"ghost": [2, 3], "streamline": [1, 2], "sleb": [1, 2]}
    return {
        "about": {"weights": weights, "calibration": text},
        "selections": [
            {"criterion": name, "remove": len(layers), "removed": layers}
            for name, two in chosen.items()
            for layers in ([4], two)
        ],
        "rows": [
            {"remove": 2, "criterion": "sleb", "recovery": "ghost-paper", "marks": [mark]}
            for mark in ("best published",)
        ],
    }


def test_every_row(
    bench: ModuleType, study: MakeStudy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = recovered(bench, study())
    made = study(known)
    monkeypatch.setattr(bench, "select_layers", None)  # all is known
    asked, exact_answers = [], bench.exact_answers

    def solve(models: dict[str, Any], *arguments: Any, **more: Any) -> Any:
        asked.extend(models.values())
        return exact_answers(models, *arguments, **more)

    monkeypatch.setattr(bench, "exact_answers", solve)
    made.begin()
    for name in bench.ROWS:
        made.point(name, 2)
    found = json.loads((tmp_path / "behaviour.json").read_text())["models"]["smollm2"]
    points = {item["row"]: item for item in found["points"]}
    assert list(points) == list(bench.ROWS)
    assert found["layers"] == 6 and not found["template"] and found["chance"] == {TASK: 0.5}
    assert "fidelity" not in found["dense"]
    for item in (found["dense"], *points.values()):
        assert set(item["tasks"][TASK]["right"]) <= set("01")
        assert len(item["tasks"][TASK]["right"]) == len(item["tasks"][TASK]["chosen"]) == 10
        assert [len(text) for text in item["problems"].values()] == [2, 2, 2]
    assert points["ours"]["removed"] == [2, 3] and points["nothing"]["removed"] == [1, 2]
    assert points["healed"]["learned"] == 512 and "learned" not in points["ours"]
    assert points["healed"]["fidelity"] != points["ours"]["fidelity"]
    assert points["closed form"]["corrections"] == 0 < points["ours"]["corrections"]
    assert points["closed form"]["fidelity"] != points["ours"]["fidelity"]
    assert points["paper"]["fidelity"] != points["nothing"]["fidelity"]
    # Of dense and five others.
    assert len({id(model) for model in asked}) == len(asked) == 6 and asked[0] is made._dense

    # The best published pair chose the same layers as the paper's: one model, measured once.
    assert points["published"]["criterion"] == "sleb"
    assert points["published"]["seconds"] == points["paper"]["seconds"]

    # What is kept of the answers says what the library says of the models.
    pruned = prune_model(made._dense, [1, 2])
    own, dense = (
        evaluate_tasks(model, tiny_tokenizer(), [TASK], 10, choices=True)
        for model in (pruned, made._dense)
    )
    (score,) = with_flips(own, dense)
    rights = points["nothing"]["tasks"][TASK]["right"]
    assert rights.count("1") / 10 == pytest.approx(score.value)
    chosen = (item["tasks"][TASK]["chosen"] for item in (points["nothing"], found["dense"]))
    changed = sum(one != other for one, other in zip(*chosen, strict=True))
    assert changed > 0 and changed / 10 == pytest.approx(score.flips)


def test_what_is_there_is_not_made_again(
    bench: ModuleType, study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = study(recovered(bench, study()))
    made.begin()
    made.point("nothing", 2)
    monkeypatch.setattr(bench, "judged", None)
    again = study(recovered(bench, made))
    again.begin()
    again.point("nothing", 2)
    assert again.found == made.found
    with pytest.raises(ArgumentError, match="choose another --output"):
        study(questions=9)
    monkeypatch.setattr(bench, "model_digest", lambda model: "of another model")
    with pytest.raises(ArgumentError, match=r"'of another model'\) in .*choose another --output"):
        study()


def test_rows_are_models_of_their_own(bench: ModuleType, study: MakeStudy) -> None:
    made, digests = study(), {}
    for name in ("closed form", "healed", "ours", "paper", "nothing"):
        digests[name] = model_digest(made._made(bench.ROWS[name], [2, 3])[0])
    assert len(set(digests.values())) == 5
    # What is healed is a copy.
    corrected = study()._made(bench.ROWS["ours"], [2, 3])[0]
    assert digests["ours"] == model_digest(corrected)


def test_layers_are_chosen_where_nobody_has(
    bench: ModuleType, study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = recovered(bench, study())
    for name in ("weights", "calibration"):
        other = {**known, "about": {**known["about"], name: "of another model"}}
        made, asked = study(other), []
        original = bench.select_layers

        def select(*arguments: Any, asked: list = asked, call: Any = original, **more: Any) -> Any:
            asked.append(arguments[3])
            return call(*arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(bench, "select_layers", select)
            assert len(made._removed("streamline", 2)) == 2
        assert asked == ["streamline"]
    nobody = study()
    nobody.point("published", 2)
    assert nobody.found["points"] == []
