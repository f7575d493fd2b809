"""The hash that says whether the audit is of these kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import audit

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
