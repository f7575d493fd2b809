"""The ceilings that static predictions divide by, and the hash that says whether the audit is of these kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import audit
from benchmarks.ceilings import Ceilings, on_record
from benchmarks.results import write_result


def test_predictions_divide_by_measured_ceilings_where_there_are_any(tmp_path: Path) -> None:
    assert on_record(tmp_path).source == "stated, not measured here"
    environment = {"commit": "ab" * 20, "dirty": False, "date": "", "device": "NVIDIA H200", "packages": {}}
    found = {"gemm_flops_per_s": {"bf16": 5e14}, "copy_bytes_per_s": 1e30}
    write_result("linear", "cuda", {"environment": environment, "ceilings": found, "rows": []}, tmp_path)
    assert on_record(tmp_path) == (5e14, 1e30, "measured, commit ababababab")


def test_a_merge_is_predicted_to_move_every_weight_once_each_way() -> None:
    from benchmarks.merge_kernel import VIT_L, predicted

    seconds = predicted(2, Ceilings(1.0, 1e9))
    assert seconds == pytest.approx(sum(2 * 2 * rows * columns for rows, columns in VIT_L) / 1e9)


KERNEL = """
# A comment.
def kernel(x):
    \"\"\"What it does.\"\"\"
    return x + 1
"""


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        (KERNEL.replace("x + 1", "(x + 1)").replace("# A comment.", "").replace("What", "All that"), True),
        (KERNEL.replace("+ 1", "+ 2"), False),
    ],
)
def test_the_hash_follows_the_code_and_not_its_comments(
    changed: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "KERNELS", tmp_path)
    (tmp_path / "kernel.py").write_text(KERNEL)
    before = audit.source_hash()
    (tmp_path / "kernel.py").write_text(changed)
    assert (audit.source_hash() == before) == same
