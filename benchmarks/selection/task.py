"""What a task is: it trains a model once as a configuration says, and measures it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict, cast


@dataclass(frozen=True)
class Configuration:
    """One row of the comparison, the same for every task.

    Attributes:
        name: unique, such as "budget-solo 11 %".
        settings: fields of `TrainSettings` beside those that the task gives to every row. "lr" is set by the engine.
        scales: factors of the update, each of which is measured as well, as if merged with `--scale`.
        retain: 64 samples for `slora.training.train(..., retain=...)`: "old" (none of which the measures use),
            "labelled" (the same, and their labels for replay with `replay_weight`), or instead of old ones "generic"
            and "mixed" (made of training samples) or "target" (training samples); None for none.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    scales: Sequence[float] = ()
    retain: str | None = None


class Measures(TypedDict):
    """What is measured of a trained model.

    Attributes:
        target: percent on test samples of the new task, higher is better.
        nll: cross-entropy there in nats, labels smoothed as in training.
        lost: points lost on the old task by each measure of `Task.retention`; negative if gained.
        drift: `mean ||f - f_base||^2 / mean ||f_base - mean f_base||^2` of the final features of old samples that no
            training used.
    """

    target: float
    nll: float
    lost: dict[str, float]
    drift: float


class Scaled(Measures):
    """The same with the update times `scale`."""

    scale: float


class Record(Measures):
    """One run.

    Attributes:
        active: blocks of the result.
        blocks: of the adapted model.
        ranks: of all blocks of the result together.
        kept: trained parameters of the result, the head included.
        flops: of all training steps; None where not counted.
        seconds: processor time of the training, of one thread.
        scaled: one entry for each of `Configuration.scales`.
    """

    active: int
    blocks: int
    ranks: int
    kept: int
    flops: int | None
    seconds: float
    scaled: list[Scaled]


def record(found: Mapping[str, Any], lost: Mapping[str, str]) -> Record:
    """Return what `slora.demo.methods.train_once` and the like return as a record; `lost`: `{its key: theirs}`."""

    def measures(each: Mapping[str, Any]) -> Measures:
        return {
            "target": round(100 * each["accuracy"], 4),
            "nll": round(each["nll"], 5),
            "lost": {name: round(each[key], 4) for name, key in lost.items()},
            "drift": float(f"{each['drift']:.5g}"),
        }

    counts = {name: found[name] for name in ("active", "blocks", "ranks", "kept", "flops")}
    scaled = [{"scale": each["scale"], **measures(each)} for each in found["scaled"]]
    return cast(Record, {**measures(found), **counts, "seconds": round(found["cpu_seconds"], 2), "scaled": scaled})


class Task(Protocol):
    """A new task and an old one. Making one costs nothing: `run` reads data and weights, once per process.

    Attributes:
        name: such as "noisy"; names the file of its runs.
        title: a line for the page.
        family: tasks of a family share learning rates and penalties.
        target: heading of the measure of the new task, such as "target %" or "recall@1 %".
        retention: `{key of Record.lost: heading}`; forgetting is the mean of these.
        rates: the learning rates that are tried for every row.
        probe: whether a head is trained, so that there is a linear probe. Without one the line to beat begins at the
            pretrained model: plain LoRA scaled by 0.
        retains: the kinds of `Configuration.retain` that it has.
    """

    name: str
    title: str
    family: str
    target: str
    retention: Mapping[str, str]
    rates: Sequence[float]
    probe: bool
    retains: Sequence[str]

    def check(self) -> None:
        """Find out before the first run whether what the task needs is here.

        Raises:
            BenchmarkError: something is not; says how to get it.
        """
        ...

    def run(self, configuration: Configuration, seed: int, validation: bool = False, quick: bool = False) -> Record:
        """Train and measure once; `seed` determines the result.

        Args:
            configuration: what to train; `settings` includes "lr".
            seed: of the data's order and of initial weights. FLOPs are counted for seed 0 alone.
            validation: measure on samples kept for choosing settings instead of the test samples, of the old task too.
            quick: a few steps, which show that everything works.
        """
        ...
