"""Retention: keeps a model from forgetting while it is fine-tuned.

term.py           `Term`: what is added to the loss, the interface of those below
distillation.py   `Distillation`: keeps the final features of a few unlabelled samples close to those of the base model
local_drift.py    `LocalDrift`: keeps the outputs of each adapted layer close to those of the base model
feature_drift.py  `feature_drift`: how far each block alone moves the final features
l2.py             `L2`: keeps the weights close to those of the base model
ewc.py            `EWC`: the same, weighted by how much the features depend on each weight
replay.py         `Replay`: goes on training labelled old samples
generic.py        `generic_samples`, `mixed_samples`: proxies of old data for users who have none
"""

from slora.retention.distillation import Distillation
from slora.retention.ewc import EWC
from slora.retention.feature_drift import feature_drift
from slora.retention.generic import generic_samples, mixed_samples
from slora.retention.l2 import L2
from slora.retention.local_drift import LocalDrift
from slora.retention.replay import Replay
from slora.retention.term import Term

__all__ = [
    "EWC",
    "L2",
    "Distillation",
    "LocalDrift",
    "Replay",
    "Term",
    "feature_drift",
    "generic_samples",
    "mixed_samples",
]
