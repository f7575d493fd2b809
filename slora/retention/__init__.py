"""Retention: keeps a model from forgetting while it is fine-tuned.

distillation.py   `Distillation`: keeps the final features of a few unlabelled samples close to those of the base model
generic.py        `generic_samples`: noise and shuffled patches, for users who have no old data
"""

from slora.retention.distillation import Distillation
from slora.retention.generic import generic_samples

__all__ = ["Distillation", "generic_samples"]
