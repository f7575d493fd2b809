"""Training: from a model and a data set to an adapter, or to fully trained weights for comparison.

    methods.py       what is trainable: selective, lora, full, linear
    optimizers.py    learning rates over the run, and the gates' own rule
    strategies.py    which blocks stay: the strategy that the settings ask for; head_first.py: the head alone, before
    retained.py      samples of what the model is to keep
    trainer.py       the loop: `train`; process.py: accelerate and signals around it, measure.py: losses and time,
                     nonfinite.py: which layer is not finite first
    checkpoint.py    what a run needs to go on; random_states.py: its random generators
    run.py           the `finetune` command, which fills the run directory (`slora.runs`)
    evaluate_run.py  the `evaluate` command; merge_run.py: the `merge` command

Read in this order. Nothing here is imported by the core of slora; it needs `pip install "slora[train]"`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from slora.runs.settings import TrainSettings

if TYPE_CHECKING:
    from slora.training.head_first import train_head
    from slora.training.methods import prepare
    from slora.training.trainer import Interrupted, TrainResult, train

__all__ = ["Interrupted", "TrainResult", "TrainSettings", "prepare", "train", "train_head"]

# What needs torch, imported when it is first asked for.
_HOMES = {
    "Interrupted": "slora.training.trainer",
    "TrainResult": "slora.training.trainer",
    "prepare": "slora.training.methods",
    "train": "slora.training.trainer",
    "train_head": "slora.training.head_first",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            value = getattr(importlib.import_module(_HOMES[name]), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module 'slora.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
