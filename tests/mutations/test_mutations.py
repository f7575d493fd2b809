"""Damaged files give a correct load or an error of slora's own, with everything as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations import adapters
from tests.mutations.generator import mutants
from tests.mutations.kinds import KINDS
from tests.mutations.trials import run


@pytest.mark.once
@pytest.mark.parametrize("first", range(0, 2000, 500))
@pytest.mark.parametrize("name", KINDS)
def test_each_of_2000_mutants_is_loaded_as_it_says_or_refused_with_nothing_changed(
    name: str, first: int, tmp_path: Path
) -> None:
    outcome = run(KINDS[name](), tmp_path / name, range(first, first + 500))
    assert not outcome.wrong, "\n".join(f"{number}: {what}" for number, what in outcome.wrong.items())
    assert outcome.loaded
    assert outcome.refused > outcome.loaded


def test_a_mutant_follows_from_the_seed_and_its_number_alone() -> None:
    kind = adapters.kind()
    many = list(mutants(kind.files, range(20), other=kind.other))
    (one,) = mutants(kind.files, range(7, 8), other=kind.other)
    assert one == many[7]
    assert len({tuple(mutant.files.values()) for mutant in many}) > 15
    assert list(mutants(kind.files, range(20), other=kind.other, seed=1)) != many
