"""The README's tables are what the result files give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import readme

TEXT = (
    "a\n<!-- demo-table -->\nold\n<!-- /demo-table -->\nb\n<!-- train-step-table -->\n<!-- /train-step-table -->\nc\n"
)


def test_the_tables_in_the_tree_are_what_the_result_files_give() -> None:
    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.filled(text) == text, "run: python -m benchmarks.readme"


def test_a_missing_result_says_not_measured(tmp_path: Path) -> None:
    text = readme.filled(TEXT, tmp_path)
    assert text.count(readme.NOT_MEASURED) == 2
    assert "old" not in text
    assert text.startswith("a\n")
    assert text.endswith("c\n")


def test_the_demo_table_holds_means_and_spreads_of_its_runs(tmp_path: Path) -> None:
    run = {"method": "lora", "active": 36, "blocks": 36, "trainable": 1000, "flops": 2e12, "seconds": 3.0}
    runs = [
        {**run, "seed": 0, "target_accuracy": 0.97, "source_after": 0.90},
        {**run, "seed": 1, "target_accuracy": 0.99, "source_after": 0.94},
    ]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "demo.json").write_text(json.dumps({"source_before": 0.99, "runs": runs}))
    text = readme.filled(TEXT, tmp_path)
    assert "| LoRA on all blocks | 98.00 ± 1.41 | 7.00 ± 2.83 | 36.0 of 36 | 1,000 | 2.00 | 3.0 |" in text
    assert "over 2 seeds" in text


def test_a_readme_without_its_marks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="demo-table"):
        readme.filled("nothing marked here", tmp_path)
