"""The lists of mutants fit the sources; run.py runs them (`make test-mutants`)."""

from __future__ import annotations

import pytest
from mutants.mutant import Mutant
from mutants.run import ROOT, all_mutants

MUTANTS = all_mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_can_be_planted(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
    for argument in mutant.tests:
        path = argument.split("::")[0]
        if path.endswith(".py"):
            assert (ROOT / path).exists(), path


def test_there_are_enough_and_each_has_its_name() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) >= 15 and len(set(names)) == len(names)
    assert sum(mutant.equivalent is not None for mutant in MUTANTS) <= len(MUTANTS) // 10
