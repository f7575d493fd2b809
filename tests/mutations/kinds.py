"""The kinds of files that are mutated."""

from __future__ import annotations

from collections.abc import Callable

from tests.mutations import adapters, checkpoints
from tests.mutations.trials import Kind

KINDS: dict[str, Callable[[], Kind]] = {
    "adapter": adapters.kind,
    "checkpoint": checkpoints.gates,
    "checkpoint of a budget": checkpoints.budget,
}
