"""Training: from a model and a data set to an adapter, or to fully trained weights for comparison.

trainable.py     which parameters are trained: selective, lora, full, linear
optimizers.py    the optimizers of weights and gates; schedule.py: steps and learning rate
make_strategy.py the selection strategy that the settings ask for; make_terms.py: what they add to
                 the loss for retention; retain_images.py, replay_images.py: its images
loss.py          the loss of a run on a batch
head_first.py    trains a new head alone before the run
entry.py         `train`: checks everything, then runs the trainer; result.py: what it returns
trainer.py       the loop; process.py: accelerate and signals; measure.py: losses, time, FLOPs, active blocks
nonfinite.py     what a loss that is not finite comes from
checkpoint_save.py  checkpoint_load.py  fingerprint.py  random_states.py  what a run resumes from
finetune_run.py  the `finetune` command, which fills a run directory (`slora.runs`)
run_model.py     the model of a run, for the commands that read one: evaluate_run.py, merge_run.py, sweep_run.py
eval_models.py   that model before and after fine-tuning; eval_rows.py: each measurement with both

Needs `pip install "slora[train]"`; the core of slora does not import it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from slora.runs.settings import TrainSettings

if TYPE_CHECKING:
    from slora.training.entry import train
    from slora.training.head_first import train_head
    from slora.training.result import Interrupted, TrainResult
    from slora.training.trainable import prepare

__all__ = ["Interrupted", "TrainResult", "TrainSettings", "prepare", "train", "train_head"]

# Imported at first use, because they import torch.
_HOMES = {
    "Interrupted": "slora.training.result",
    "TrainResult": "slora.training.result",
    "prepare": "slora.training.trainable",
    "train": "slora.training.entry",
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
