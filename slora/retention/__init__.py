"""Retention: keeps a model from forgetting while it is fine-tuned.

distillation.py   `Distillation`: keeps the final features of a few unlabelled samples close to those of the base model
generic.py        `generic_samples`: samples for it if there are none, noise and shuffled patches
"""

from slora.retention.distillation import Distillation
from slora.retention.generic import generic_samples

__all__ = ["Distillation", "generic_samples"]
