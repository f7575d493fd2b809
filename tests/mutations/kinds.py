"""The kinds of files that are mutated."""

from __future__ import annotations

from collections.abc import Callable

from tests.mutations import checkpoints
from tests.mutations.trials import Kind

KINDS: dict[str, Callable[[], Kind]] = {
    "checkpoint": checkpoints.gates,
    "checkpoint of a budget": checkpoints.budget,
}
