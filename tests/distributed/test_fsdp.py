"""`fully_shard` of an adapted model, in two processes: what one process computes of all rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import fsdp_runs

# Sums of at most 16 terms in another order over ten steps, of numbers below 4: a few units in the last place.
ROUNDING = 4e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where adapters are saved."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def results(two_processes: Callable[..., list[Any]], folder: Path) -> list[dict[str, Any]]:
    """What each process found."""
    return two_processes(fsdp_runs.results, folder)


@pytest.mark.parametrize(("sharded", "inactive", "rule"), fsdp_runs.CASES)
def test_gates_move_and_blocks_go_off_as_in_one_process(
    results: list[dict[str, Any]], sharded: str, inactive: str, rule: str
) -> None:
    found, alone = results[0][f"{sharded} {inactive} {rule}"]
    assert found["active"] == alone["active"]
    # Blocks went off, and one layer came back by hand.
    assert len(set(map(sum, alone["active"]))) > 1
    assert found["moved"] == alone["moved"]
    for name, scores in alone["gates"].items():
        assert found["gates"][name] == pytest.approx(scores, abs=ROUNDING)
    assert np.abs(np.subtract(found["output"], alone["output"])).max() < ROUNDING


@pytest.mark.parametrize("sharded", fsdp_runs.SHARDED)
def test_a_budget_chooses_as_in_one_process(results: list[dict[str, Any]], sharded: str) -> None:
    found, alone = results[0][f"{sharded} budget"]
    assert found["active"] == alone["active"]
    assert sum(found["active"]) == 3
    assert found["summary"] == alone["summary"]
    assert np.abs(np.subtract(found["output"], alone["output"])).max() < ROUNDING


def test_a_fixed_choice_and_one_made_before_sharding_stand(results: list[dict[str, Any]]) -> None:
    assert results[0]["fixed"] == [False] * 5 + [True] * 3
    for sharded in fsdp_runs.SHARDED:
        alone, found = results[0][f"{sharded} sensitivity"]
        assert found == alone
        assert sum(found) == 3


@pytest.mark.parametrize("sharded", fsdp_runs.SHARDED)
def test_an_adapter_goes_into_a_plain_model_and_into_another_sharded_one(
    results: list[dict[str, Any]], folder: Path, sharded: str
) -> None:
    for result in results:
        outputs = result[f"{sharded} saved"]
        assert np.abs(np.subtract(outputs["merged"], outputs["before"])).max() < ROUNDING
        assert outputs["loaded"] == outputs["before"]
    assert sorted(path.name for path in (folder / sharded.replace(" ", "-")).iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "selective.json",
    ]  # fmt: skip


def test_both_processes_find_the_same(results: list[dict[str, Any]]) -> None:
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("call", "remedy"),
    [
        ("merge", "load it into a model that is not, and merge there"),
        ("unload", "go on with a model that is not"),
        ("release", "free them before"),
        ("inject", "call slora.inject or slora.load_adapter before fully_shard"),
        ("sensitivity", "create Sensitivity before fully_shard"),
    ],
)
def test_what_needs_whole_parameters_is_refused(results: list[dict[str, Any]], call: str, remedy: str) -> None:
    assert remedy in results[0]["refused"][call]


def test_gates_that_are_rounded_for_the_forward_decide_as_they_are(results: list[dict[str, Any]]) -> None:
    assert results[0]["rounded"] == [False, True] * 4


def test_with_all_gates_low_the_model_is_the_base(results: list[dict[str, Any]]) -> None:
    off, base = results[0]["off"]
    assert off == base
