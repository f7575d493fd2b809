"""Errors that slora raises.

Every class derives from `SLoRAError` and from the builtin that a caller would expect, so both
`except slora.SLoRAError` and `except ValueError` work. A message names the thing, its value and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable


class SLoRAError(Exception):
    """Base class of all errors raised by slora."""


class ConfigError(SLoRAError, ValueError):
    """A setting has a value that cannot work."""


class TargetError(SLoRAError, ValueError):
    """A pattern selects no module, or one that cannot be adapted."""


class ShapeError(SLoRAError, ValueError):
    """Tensors whose shapes, dtypes or devices disagree reached an operator."""


class StateError(SLoRAError, RuntimeError):
    """A call that the model's present state does not allow, such as merging twice."""


class CheckpointError(SLoRAError, RuntimeError):
    """A file is missing, damaged, or belongs to another model."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is damaged; another one of its run may not be."""


class WriteError(CheckpointError):
    """A file could not be written: the disk is full, or the folder is not writable."""


class BaseModelWarning(UserWarning):
    """An adapter was loaded into a model of the right shapes with other values than it was trained on."""


class GateRuleWarning(UserWarning):
    """An optimizer moves gates by a rule that cannot tell useful blocks from others."""


class NarrowParameterWarning(UserWarning):
    """What `modules_to_save` trains is in 16 bits, in which small steps of an optimizer are lost."""


class ReplacedLayerWarning(UserWarning):
    """Layers that were adapted have been replaced since, so that what was trained there is lost."""


class UntrainedLayerWarning(UserWarning):
    """Training has not changed adapted layers, for instance because no forward reaches them."""


class SkippedLayerWarning(UserWarning):
    """Linear layers that "all-linear" selects could not be adapted."""


class UnsavedParameterWarning(UserWarning):
    """Trained parameters were not saved with the adapter, because `modules_to_save` does not name them."""


class UnfinishedSelectionWarning(UserWarning):
    """An adapter was saved before its strategy had made its choice, so it holds more blocks than asked for."""


class DataError(SLoRAError, ValueError):
    """A data set is missing, empty or damaged beyond what can be skipped."""


class MissingDependencyError(SLoRAError, ImportError):
    """A feature needs a package that is not installed."""


class NonFiniteLossError(SLoRAError, FloatingPointError):
    """The loss became NaN or infinite.

    Attributes:
        diverged: whether a lower learning rate may help; not if the cause is the data, the base model or the
            criterion, which the message then says.
    """

    def __init__(self, message: str, diverged: bool = True) -> None:
        super().__init__(message)
        self.diverged = diverged


def quoted(names: Iterable[str], most: int = 5) -> str:
    """Return names for a message, in quotes: the first `most`, and how many more there are."""
    each = [repr(name) for name in names]
    return ", ".join(each[:most]) + (f" and {len(each) - most} more" if len(each) > most else "")
