"""The glyph CLIP as a task of the comparison of strategies."""

from __future__ import annotations

import pytest

from benchmarks.selection.registry import task_named
from benchmarks.selection.task import Configuration, Measures, Record

pytestmark = pytest.mark.once


def test_a_quick_run_gives_a_record_and_scaled_by_nothing_the_pretrained_model() -> None:
    task = task_named("glyphs")
    settings = {"strategy": "last", "budget": 0.11, "lr": 7e-3}
    found = task.run(Configuration("last 11 %", settings, (0.0,)), 1, quick=True)
    assert found.keys() == Record.__annotations__.keys() | Measures.__annotations__.keys()
    assert found["lost"].keys() == task.retention.keys()
    assert found["ranks"] == 16 * found["active"]
    assert found["drift"] > 0
    assert found["scaled"][0]["lost"] == {"zero-shot": 0.0}
    # Squared, relative: fp32's epsilon of 1.2e-7, accumulated over less than a hundred sums in another order.
    assert found["scaled"][0]["drift"] < (100 * 1.2e-7) ** 2
