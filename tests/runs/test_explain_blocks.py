"""Why a run ended without an active block, or with all of them."""

from __future__ import annotations

from typing import Any

import pytest

from slora.runs.explain_blocks import explained, not_finite, penalty_steps

# The penalty acts for half of the steps.
SETTINGS = {
    "method": "selective", "gate_init": 0.15, "threshold": 0.1, "gate_lr": 0.01, "penalty": 1.0,
    "selection_warmup": 0.1, "settling": 0.4, "inactive": "probe",
}  # fmt: skip


def records(steps: int, every: int = 10, **more: Any) -> list[dict[str, Any]]:
    """A run of `steps` steps."""
    return [{"step": step, "loss": 1.0, **more} for step in range(every, steps + 1, every)]


@pytest.mark.parametrize(("active", "blocks"), [(1, 36), (35, 36), (0, 0)])
def test_other_runs_need_no_explanation(active: int, blocks: int) -> None:
    assert explained(active, blocks, SETTINGS, records(1000)) == ""


@pytest.mark.parametrize("more", [{"method": "lora"}, {"threshold": -1e9}], ids=["by method", "by threshold"])
def test_lora_needs_no_explanation(more: dict[str, Any]) -> None:
    assert explained(36, 36, SETTINGS | more, records(1000)) == ""


def test_the_arithmetic_of_the_readme_is_that_of_the_explanation() -> None:
    assert " = 360 steps to switch a block off, and acted for 100. " in explained(72, 72, SETTINGS, records(200))


def test_too_short_a_run_gets_the_rate_that_takes_half_of_its_steps() -> None:
    text = explained(36, 36, SETTINGS, records(200))
    assert text.startswith("all blocks are active")
    # 180 steps at 0.01; half of the 100 steps asks for 180 / 50 times the rate.
    assert text.endswith("Train longer, or set gate_lr=0.04.")


def test_gates_that_the_task_holds_up_want_a_penalty() -> None:
    assert explained(36, 36, SETTINGS, records(1000)).endswith(
        "the task keeps every gate above the threshold. Raise penalty."
    )


def test_a_penalty_that_no_block_resists_gets_a_smaller_one() -> None:
    text = explained(0, 36, SETTINGS, records(1000))
    assert text.startswith("no block is active: the model is the base model")
    assert "= 180 steps to switch a block off, and acted for 500." in text
    # 180 steps in half of the 500 asks for 0.72 of the penalty, in one digit less than that.
    assert "Set penalty=0.7." in text
    assert "Lower penalty." in explained(0, 36, SETTINGS, records(400))
    again = explained(0, 36, SETTINGS | {"penalty": 0.7}, records(1000))
    assert "Set penalty=" not in again or "Set penalty=0.7." not in again


def test_blocks_that_cannot_come_back_point_to_the_policy() -> None:
    assert "Under inactive='frozen' no block comes back: try inactive='probe'." in explained(
        0, 36, SETTINGS | {"inactive": "frozen"}, records(1000)
    )


def test_blocks_that_the_penalty_cannot_have_switched_off_point_to_the_rates() -> None:
    assert explained(0, 36, SETTINGS, records(200)).endswith("Lower lr or gate_lr.")


@pytest.mark.parametrize("setting", ["gate_lr", "penalty"])
def test_a_penalty_that_never_acted_is_named(setting: str) -> None:
    assert f"{setting}=0 " in explained(36, 36, SETTINGS | {setting: 0.0}, records(1000))
    assert "acted for 0 steps" in explained(36, 36, SETTINGS | {"selection_warmup": 0.6}, records(100))


@pytest.mark.parametrize(("settings", "steps"), [({}, 1000), (SETTINGS, 0)], ids=["no settings", "no records"])
def test_without_settings_or_records_the_remedy_is_general(settings: dict[str, Any], steps: int) -> None:
    text = explained(0, 36, settings, records(steps))
    assert text.endswith("such as the head. Lower the penalty, or lengthen its warm-up.")


def test_steps_of_the_penalty_are_those_of_its_phase() -> None:
    assert penalty_steps(SETTINGS, [*records(400), {"step": 400, "eval_loss": 1.0}]) == 200
    assert penalty_steps(SETTINGS | {"selection_warmup": None, "settling": None}, records(60)) == 34
    assert penalty_steps(SETTINGS, []) == 0


def test_a_budget_is_what_was_asked_for() -> None:
    text = explained(0, 36, SETTINGS | {"budget": 0}, records(400))
    assert text.startswith("no block is active: the model is the base model, but for modules trained in full")
    assert text.endswith(", as asked for by budget=0.")
    assert explained(4, 36, SETTINGS | {"budget": 4}, records(400)) == ""
    # Not gates that the task held above the threshold.
    text = explained(36, 36, SETTINGS | {"strategy": "all"}, records(400))
    assert text == "all blocks are active, as asked for by strategy all."


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        ({"step": 31, "error": "the loss is nan at step 31"}, "the loss is nan at step 31"),
        ({"step": 30, "eval_loss": None, "eval_accuracy": 0.1}, "evaluation data is not finite at step 30"),
    ],
    ids=["error", "evaluation"],
)  # fmt: skip
def test_what_was_not_finite_is_found(broken: dict[str, Any], text: str) -> None:
    assert not_finite(records(30)) == ""
    assert not_finite([*records(30), broken]).endswith(text)
