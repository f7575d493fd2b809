"""The comparison of ways to keep old knowledge: its numbers by hand, and that it runs what is missing."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from benchmarks.retention import command, table
from benchmarks.retention.variants import BASES, VARIANTS
from slora.runs.settings import TrainSettings


def made(variant: str, weight: float, seed: int, nll: float, lost: float, **others: Any) -> dict[str, Any]:
    return {
        "base": "head-first", "variant": variant, "weight": weight, "shift": "noisy", "seed": seed, "validation": False,
        "accuracy": 0.9, "nll": nll, "knn": lost, "head": lost, "scaled": [], **others,
    }  # fmt: skip


def plain(seed: int, **others: Any) -> dict[str, Any]:
    half = {"scale": 0.5, "accuracy": 0.8, "nll": 1.0, "knn": 1.0, "head": 1.0}
    return made("none", 0.0, seed, nll=0.8, lost=3.0, scaled=[half], **others)


RUNS = [
    *(plain(seed) for seed in (0, 1, 2)),
    plain(11, validation=True),
    made("l2", 0.01, 11, nll=0.95, lost=2.0, validation=True),
    made("l2", 0.1, 11, nll=0.85, lost=2.0, validation=True),
    made("l2", 0.01, 0, nll=0.1, lost=2.0),
    *(made("l2", 0.1, seed, nll=0.8 + 0.01 * seed, lost=2.0) for seed in (0, 1, 2)),
]


def test_a_run_is_compared_with_plain_lora_scaled_to_the_same_forgetting() -> None:
    # Halfway between losing 1 and 3 points: accuracy 85 %, NLL 0.9.
    assert table.against(made("l2", 0.1, 0, nll=0.8, lost=2.0), plain(0)) == pytest.approx((5.0, -0.1))
    # Less than the smallest scale loses: compared with that.
    assert table.against(made("l2", 0.1, 0, nll=0.8, lost=0.1), plain(0)) == pytest.approx((10.0, -0.2))


def test_the_weight_is_chosen_on_validation_and_the_table_has_its_test_runs() -> None:
    assert table.chosen_weight(RUNS, "head-first", "l2") == 0.1
    assert table.chosen_weight(RUNS, "selective", "l2") == 0.1
    assert table.chosen_weight(RUNS, "head-first", "replay") is None
    assert [nll for _, nll in table.differences(RUNS, "head-first", "l2")] == pytest.approx([-0.1, -0.09, -0.08])
    first, second = table.rows(RUNS, "head-first")
    assert first[:3] == ["nothing", "", "3"]
    assert second[:3] == ["L2 to the base", "0.1", "3"]
    assert second[-1] == "-0.090 ± 0.010"
    assert table.verdict(RUNS, "head-first") == {
        "better": ["L2 to the base"], "not told apart": [], "worse": [], "too few runs": [],
    }  # fmt: skip
    text = table.page(RUNS)
    assert "* NLL better: L2 to the base." in text
    assert f"* {11 * 10 - 6} runs are missing." in text


def test_what_is_missing_is_run_in_the_order_of_seeds_after_the_weights() -> None:
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    args = parser.parse_args(["--tune", "--bases", "head-first", "--variants", "l2", "--seeds", "0", "3"])
    found = [(case.variant, case.weight, case.shift, case.seed) for case in command.wanted(args, list(RUNS))]
    assert found == [
        ("l2", 0.001, "noisy", 11),
        ("none", 0.0, "mnist", 0),
        ("l2", 0.1, "mnist", 0),
        *((name, weight, shift, 3) for shift in ("noisy", "mnist") for name, weight in (("none", 0.0), ("l2", 0.1))),
    ]


def test_every_variant_is_settings_of_a_run() -> None:
    for variant in VARIANTS.values():
        for weight in variant.weights:
            settings = TrainSettings(budget=4, **variant.own)
            assert settings.replace(**({variant.setting: weight} if variant.setting else {}))
        assert set(variant.bases) <= set(BASES)
        assert len(variant.weights) <= 3
