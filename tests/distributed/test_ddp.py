"""`DistributedDataParallel` around an adapted model, in two processes: what one process computes of all rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed import ddp_runs


@pytest.fixture(scope="module")
def results(two_processes: Callable[..., list[Any]]) -> list[dict[str, Any]]:
    """What each process found."""
    return two_processes(ddp_runs.results)


@pytest.mark.parametrize(("kind", "inactive", "rule"), ddp_runs.CASES)
def test_blocks_may_go_off_and_come_back(results: list[dict[str, Any]], kind: str, inactive: str, rule: str) -> None:
    # Sums of at most 16 terms in another order over six steps, of numbers below 1: a few units in the last place.
    assert results[0][f"{kind} {inactive} {rule}"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("strategy", ["budget", "gates"])
@pytest.mark.parametrize("kind", ddp_runs.KINDS)
def test_a_strategy_may_take_gates_out_of_training_after_the_wrapper_was_made(
    results: list[dict[str, Any]], kind: str, strategy: str
) -> None:
    found, alone = results[0][f"{kind} {strategy}"]
    assert found == alone
    assert 0 < sum(found) < len(found)


@pytest.mark.parametrize("checkpointing", ["reentrant", "not reentrant"])
def test_activations_may_be_computed_again(results: list[dict[str, Any]], checkpointing: str) -> None:
    assert results[0][f"checkpointing {checkpointing}"] == pytest.approx(0.0, abs=1e-6)


def test_processes_stay_equal_bit_for_bit(results: list[dict[str, Any]]) -> None:
    assert [result["apart"] for result in results] == [0.0, 0.0]


def test_a_dead_frozen_gate_stays_what_it_was(results: list[dict[str, Any]]) -> None:
    alive, dead = results[0]["dead"]
    assert dead == pytest.approx(0.05, abs=1e-9)
    assert alive != pytest.approx(0.15, abs=1e-9)
