"""Nothing that people use goes wrong: models of many classes, cut in the middle.

`make test-families` does the same with every class and every place.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from families.measures import tokens
from families.outcomes import FAILS, WORKS, Outcome, summary
from families.sweep import check, run_one
from families.tiny_models import tiny_causal
from ghosted_fast.options import RunOptions
from ghosted_fast.selection.select import select_layers

# One of each form that a class can have.
MODELS = [
    ("causal", "bloom"),  # layers that return tuples
    ("causal", "openai-gpt"),  # layers that return lists
    ("causal", "gpt_neo"),  # kinds of layers in nested lists
    ("causal", "falcon_h1"),  # a buffer that the model fills
    ("causal", "internlm3"),  # a class that another family has too
    ("causal", "bert"),  # layers deep inside, a norm at their end
    ("causal", "trocr"),  # a decoder that is called past its base model
    ("causal", "mamba"),  # no attention
    ("causal", "longcat_flash"),  # two indices a layer
    ("causal", "diffllama"),  # constants made of the index
    ("causal", "llama4_text"),  # a list of all indices
    ("causal", "gemma4_text"),  # settings of single layers, shared keys
    ("variants", "qwen2_moe@every-second"),  # a rule in place of a list
    ("wrappers", "gemma4"),
    ("wrappers", "qwen3_5"),  # positions in several axes
    ("wrappers", "nemo_speechlm"),  # infinity in the configuration
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), MODELS, ids=[name for _, name in MODELS])
def test_no_cut_goes_wrong(kind: str, name: str, tmp_path: Path) -> None:
    cuts = ("first", "middle")
    for outcome in run_one(kind, name, cuts, tmp_path):
        assert outcome.verdict != FAILS, (outcome.cut, outcome.reason)


@pytest.mark.slow
def test_layers_that_cannot_go_are_not_chosen() -> None:
    # The first block of RWKV holds a norm that all others need: no run may begin there.
    dense, texts = tiny_causal("rwkv"), [tokens(4, 32, seed) for seed in range(12)]
    chosen = select_layers(dense, texts, 2, run=RunOptions(progress=False))
    assert 0 not in chosen.removed
    assert (0, 2) not in {(score.start, score.stop) for score in chosen.scores}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hy_v4", "zaya", "cpmant"])
def test_states_that_a_ghost_cannot_map_are_refused(name: str, tmp_path: Path) -> None:
    outcome = check("causal", name, "middle", tmp_path / "model")
    assert outcome.columns == {"prune": "refused"}
    assert "state" in outcome.reason


def test_a_model_works_if_only_needed_layers_are_refused() -> None:
    good = Outcome("causal", "one", "first", {"prune": "ok"})
    needed = Outcome(
        "causal", "one", "middle", {"prune": "refused"}, {"prune": "expected layer 3 to be kept"}
    )
    other = Outcome("causal", "two", "first", {"prune": "refused"}, {"prune": "another state"})
    lost = Outcome("causal", "four", "first", {"prune": "ok", "reload": "dense"})
    wrong = Outcome("causal", "three", "last", {"prune": "ok", "reload": "fail"})
    last = Outcome("causal", "one", "last", {"prune": "ok"})
    walled = [replace(item, name="five") for item in (good, needed)]
    found = summary([good, needed, last, other, wrong, lost, *walled])
    assert {name: model["verdict"] for name, model in found.items()} == {
        "one": WORKS,
        "two": "refused",
        "three": FAILS,
        "four": "partly",
        "five": "partly",
    }
