"""What a run returns, `TrainResult`, or raises when it is stopped, `Interrupted`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Blocks = dict[str, tuple[int, ...]]


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has written a checkpoint.

    Attributes:
        checkpoint: the folder to resume from.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(f"stopped; the last checkpoint is {folder}")
        self.checkpoint = folder


@dataclass
class TrainResult:
    """The outcome of a run.

    Attributes:
        history: the records of the run, as in `metrics.jsonl`: every `log_every` steps `step, epoch, loss,
            accuracy, lr, penalty, grad_norm, active, blocks, mean_gate, images_per_second, seconds, flops`, under
            method "selective" `gates: {layer: [...]}`, and at evaluations `step, eval_loss, eval_accuracy`.
        accuracy: on the evaluation data after the last step, 0 to 1; None without evaluation data.
        best_accuracy: the highest since the blocks were chosen, at `best_step`.
        steps: optimizer steps taken, including those before a resume.
        seconds: training time, without evaluations, checkpoints and the counting of FLOPs.
        flops: of all training steps, forward and backward; 0 with `count_flops=False`.
        active_blocks: `[(step, {layer: numbers of its active blocks}), ...]`: at the start, and at each record before
            which they have changed; empty for methods without blocks.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    accuracy: float | None = None
    best_accuracy: float | None = None
    best_step: int | None = None
    steps: int = 0
    seconds: float = 0.0
    flops: int = 0
    active_blocks: list[tuple[int, Blocks]] = field(default_factory=list)

    def state(self, seconds: float) -> dict[str, Any]:
        """Return the result so far for a checkpoint, after `seconds` of training, as JSON values."""
        blocks = [(step, list(blocks.values())) for step, blocks in self.active_blocks]
        return dataclasses.asdict(self) | {"seconds": seconds, "active_blocks": blocks}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], layers: Iterable[str]) -> TrainResult:
        """Return the result that `state` was made of, in a model with the adapted layers named `layers`."""
        names = tuple(layers)
        blocks = [(step, dict(zip(names, map(tuple, active), strict=True))) for step, active in state["active_blocks"]]
        return cls(**{**state, "active_blocks": blocks})
