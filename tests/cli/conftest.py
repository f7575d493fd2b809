"""Running the command line in an empty folder."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slora.cli import app

QUICK = (
    "--model demo/letters_vit --data digits --r 2 --max-steps 4 --batch-size 8 --device cpu --precision fp32 "
    "--no-tensorboard --no-count-flops --log-every 2 --save-every 2 --eval-every 0"
).split()


class Outcome(types.SimpleNamespace):
    code: int
    out: str
    err: str


@pytest.fixture
def slora(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Outcome]:
    """Run the command line in an empty folder, on few digits and letters."""
    from slora.demo import digits as digits_module
    from slora.demo import letters as letters_module

    rendered, whole = letters_module.letters, digits_module.digits

    def few(seed: int) -> Any:
        (images, labels), (more_images, more_labels) = whole(seed)
        return (images[:80], labels[:80]), (more_images[:40], more_labels[:40])

    monkeypatch.setattr(letters_module, "letters", lambda n, seed: rendered(4 if n == 100 else 1, seed))
    monkeypatch.setattr(digits_module, "digits", few)
    # The page of a run takes seconds to draw, and has tests of its own.
    monkeypatch.setitem(sys.modules, "slora.report", types.SimpleNamespace(write_report=lambda run, out: run / "page"))
    monkeypatch.delenv("SLORA_TRACEBACK", raising=False)
    # --traceback sets it; this undoes that.
    monkeypatch.setenv("SLORA_TRACEBACK", "")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["slora", *arguments])
        with pytest.raises(SystemExit) as caught:
            app.main()
        out, err = capsys.readouterr()
        return Outcome(code=caught.value.code or 0, out=out, err=err)

    return run
