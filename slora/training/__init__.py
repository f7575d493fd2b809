"""Training: from a model and a data set to an adapter, or to fully trained weights for comparison.

    settings.py     every knob of a run
    data.py         data sets by name; folders.py: image folders, damaged files skipped
    models.py       models by name
    methods.py      what is trainable: selective, lora, full, linear
    optimizers.py   learning rates over the run, and the gates' own rule
    batches.py      which images form which step
    trainer.py      the run itself: `train`; process.py: accelerate and signals around it, measure.py: losses and time
    recorder.py     metrics.jsonl, TensorBoard, the progress bar
    checkpoint.py   what a run needs to go on; checkpoint_folders.py: which checkpoints there are
    rundir.py       the run directory: its files, who writes into it, how to go on with an unfinished run
    run.py          the `finetune` command, which fills it; flags.py: settings as flags
    merged.py       the `merge` command

Read in this order. Nothing here is imported by the core of slora; it needs `pip install "slora[train]"`.
"""

from slora.training.methods import prepare
from slora.training.settings import TrainSettings
from slora.training.trainer import Interrupted, TrainResult, train

__all__ = ["Interrupted", "TrainResult", "TrainSettings", "prepare", "train"]
