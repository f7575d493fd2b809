"""The cases: what `python -m benchmarks run --case NAME` knows."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.record import BenchmarkError
from benchmarks.settings import Settings

Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A case by name; `benchmarks/cases/<name>.py` has `run(settings, ceilings)`, which yields rows."""

    name: str
    summary: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    packages: tuple[str, ...] = ()
    """Without these the case cannot run at all."""

    def load(self) -> Callable[[Settings, dict[str, Any]], Rows]:
        """Import the case; only then are its peers imported."""
        run: Callable[[Settings, dict[str, Any]], Rows] = importlib.import_module(f"benchmarks.cases.{self.name}").run
        return run

    def contenders(self) -> list[str] | None:
        """Names of the contenders, of which a point need not have all; None where the module has no CONTENDERS."""
        names = getattr(sys.modules[self.load().__module__], "CONTENDERS", None)
        return None if names is None else list(names)

    def require_device(self, device: str) -> None:
        """Refuse a device that the case is not measured on.

        Raises:
            BenchmarkError: it is one.
        """
        if device not in self.devices:
            raise BenchmarkError(
                f"case {self.name!r} is measured on {' and '.join(self.devices)} only, not on {device}; leave it out, "
                f"or use --device {self.devices[0]}"
            )


CASES = {
    case.name: case
    for case in (
        Case("linear", "one linear layer: forward, and forward with backward, per shape, beside every peer"),
        Case("train_step", "one training step of a whole model, beside PEFT, full and frozen", packages=("timm",)),
        Case("train_memory", "its peak memory, in a process of its own", ("cpu",), packages=("timm",)),
        Case(
            "merge",
            "folding LoRA into all linear layers of a ViT-L/16, beside PEFT and a copy",
            packages=("timm",),
        ),
        Case("inference", "a forward: base, merged, unmerged, PEFT merged and unmerged", packages=("timm",)),
        Case("gates", "a training step under each policy for inactive blocks", packages=("timm",)),
        Case("host", "host time per layer: tiny tensors on one thread of the CPU", ("cpu",), packages=("peft",)),
        Case("scaling", "cost against rank, active share and tokens, beside what the model of costs predicts"),
    )
}


def find(name: str) -> Case:
    """Return the case called `name`.

    Raises:
        BenchmarkError: there is none.
    """
    if name not in CASES:
        raise BenchmarkError(f"case {name!r} is unknown; there are {', '.join(CASES)} (`python -m benchmarks list`)")
    return CASES[name]
