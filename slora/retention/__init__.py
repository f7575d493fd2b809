"""Retention: what holds a model to what it knew while it learns something new.

distillation.py   `Distillation`: final features of a few unlabelled samples stay where the base model has them
generic.py        samples for it where there are none: noise and shuffled patches
"""

from slora.retention.distillation import Distillation
from slora.retention.generic import generic_samples

__all__ = ["Distillation", "generic_samples"]
