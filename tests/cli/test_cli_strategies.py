"""`slora finetune --strategy`: a run of each, what is said about it afterwards, and what is refused before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import yaml

from slora.runs.rundir import CONFIG
from slora.runs.strategies import StrategyName
from tests.cli.conftest import QUICK, Outcome

Slora = Callable[..., Outcome]

pytestmark = pytest.mark.once


def test_a_strategy_chosen_before_training_is_named_inspected_and_resumed(slora: Slora) -> None:
    outcome = slora("finetune", *QUICK, "--strategy", "sensitivity", "--blocks", "2", "--out", "run")
    assert outcome.code == 0, outcome.err
    assert "active blocks: 2" in outcome.out
    assert yaml.safe_load((Path("run") / CONFIG).read_text())["strategy"] == "sensitivity"
    shown = slora("inspect", "run").out
    assert "strategy sensitivity, 2 blocks" in shown
    assert "2 of 36 blocks active" in shown
    # The choice of every checkpoint is final.
    assert "not made yet" not in slora("inspect", "run", "--checkpoint", "2").out
    refused = slora("finetune", "--resume", "run", "--max-steps", "6", "--strategy", "random")
    assert refused.code == 2
    assert "was written with strategy='sensitivity', this run has 'random'" in refused.err
    outcome = slora("finetune", "--resume", "run", "--max-steps", "6")
    assert outcome.code == 0, outcome.err
    table = shown.partition("threshold")[0]
    assert slora("inspect", "run").out.startswith(table)


def test_ranks_chosen_inside_blocks_are_inspected_and_merged(slora: Slora) -> None:
    outcome = slora("finetune", *QUICK, "--strategy", "increlora", "--blocks", "40", "--out", "run")
    assert outcome.code == 0, outcome.err
    assert "active ranks: 40 of 72; active blocks: 36;" in outcome.out
    assert "active 40/72 ranks in 36/36 blocks" in outcome.err
    shown = slora("inspect", "run").out
    assert "40 of 72 ranks active" in shown
    assert "strategy increlora, 40 ranks" in shown
    assert "36 of 36 blocks active" in shown
    assert any("/" in line.split()[4] for line in shown.splitlines() if "attn.qkv" in line)
    assert slora("inspect", "run", "--checkpoint", "last").out.startswith(shown.partition("threshold")[0])
    assert slora("merge", "run", "--out", "plain.safetensors").code == 0
    refused = slora("finetune", *QUICK, "--strategy", "adalora", "--out", "other")
    assert refused.code == 2
    assert "strategy='adalora' needs a budget" in refused.err


def test_all_blocks_are_asked_for_by_name(slora: Slora) -> None:
    outcome = slora("finetune", *QUICK, "--strategy", "all", "--out", "run")
    assert outcome.code == 0, outcome.err
    assert "all blocks are active, as asked for by strategy all." in outcome.out
    assert "strategy all" in slora("inspect", "run").out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--strategy random", "strategy='random' needs a budget; add --blocks with a number such as 4 or a share"),
        (
            "--strategy gates --blocks 4",
            "budget=4 has no effect on strategy='gates', which takes none; leave it out",
        ),
        ("--strategy last --blocks 4 --ranking norm", "ranking='norm' has no effect on strategy='last'"),
        ("--strategy last --blocks 4 --penalty 2", "penalty=2.0 has no effect on strategy='last'"),
        ("--strategy all --drift-price 1", "drift_price=1.0 has no effect on strategy='all'"),
        ("--strategy last --blocks 4 --method full", "strategy='last' needs method='selective'; method='full' trains"),
        ("--strategy last --blocks 99", "budget=99 blocks is out of range; use 0 to 36"),
        ("--strategy sensitivity --blocks 0.0001 --budget-unit parameters", "less than the smallest block takes"),
        ("--strategy mine --blocks 4", "strategy='mine' is not 'gates', 'budget', 'sora', "),
        ("--strategy sra --blocks 4", "strategy='sra' is unknown; near names are 'sora'"),
    ],
)
def test_conflicting_flags_are_refused_before_anything_is_written(
    slora: Slora,
    flags: str,
    message: str,
) -> None:
    outcome = slora("finetune", *QUICK, *flags.split(), "--out", "run")
    assert outcome.code == 2
    assert message in outcome.err
    assert not Path("run").exists()


def test_the_help_names_every_strategy(slora: Slora) -> None:
    text = " ".join(slora("finetune", "--help").out.split())
    for name in get_args(StrategyName):
        assert name in text
    assert f"--strategy {'|'.join(get_args(StrategyName))}"[:30] in text
