"""The hash that says whether the audit is of these kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import audit


def test_the_hash_follows_the_code_and_not_its_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed(text: str) -> str:
        (tmp_path / "kernel.py").write_text(text)
        return audit.source_hash()

    monkeypatch.setattr(audit, "KERNELS", tmp_path)
    code = '# A comment.\ndef kernel(x):\n    """What it does."""\n    return x + 1\n'
    assert hashed(code) == hashed('def kernel(x):\n    """All that it does."""\n    return (x + 1)\n')
    assert hashed(code) != hashed(code.replace("+ 1", "+ 2"))
