"""slora: fine-tuning by selective low-rank adaptation.

A pretrained model gets gated LoRA blocks, training decides which few of them exist, and the rest of the model
stays what it was. Start with `inject`; `slora.reference` states the mathematics.

What needs torch is imported when it is first asked for, so that the command line answers a typo at once. The operators
are registered then, too: before you load an exported program, `import slora.layers`.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from slora.config import SelectiveLoRAConfig
from slora.errors import (
    BaseModelWarning,
    CheckpointError,
    ConfigError,
    DataError,
    GateRuleWarning,
    MissingDependencyError,
    NarrowParameterWarning,
    NonFiniteLossError,
    ReplacedLayerWarning,
    ShapeError,
    SkippedLayerWarning,
    SLoRAError,
    StateError,
    TargetError,
    UnfinishedSelectionWarning,
    UnsavedParameterWarning,
    UntrainedLayerWarning,
    WriteError,
)

if TYPE_CHECKING:
    from slora.adapter import load_adapter, save_adapter
    from slora.gate import ProximalGates, gate_penalty, penalty_at, release_frozen
    from slora.inject import inject, unload
    from slora.layers import SelectiveLoRALinear, gates_on_device
    from slora.merging.merge import merge, merge_and_unload, unmerge
    from slora.model import active_blocks, disabled, parameter_groups, summary
    from slora.selection import freeze_gates, keep_blocks

__version__ = "0.1.0"

__all__ = [
    "BaseModelWarning",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GateRuleWarning",
    "MissingDependencyError",
    "NarrowParameterWarning",
    "NonFiniteLossError",
    "ProximalGates",
    "ReplacedLayerWarning",
    "SLoRAError",
    "SelectiveLoRAConfig",
    "SelectiveLoRALinear",
    "ShapeError",
    "SkippedLayerWarning",
    "StateError",
    "TargetError",
    "UnfinishedSelectionWarning",
    "UnsavedParameterWarning",
    "UntrainedLayerWarning",
    "WriteError",
    "active_blocks",
    "disabled",
    "freeze_gates",
    "gate_penalty",
    "gates_on_device",
    "inject",
    "keep_blocks",
    "load_adapter",
    "merge",
    "merge_and_unload",
    "parameter_groups",
    "penalty_at",
    "release_frozen",
    "save_adapter",
    "summary",
    "unload",
    "unmerge",
]

_LAZY = {
    "adapter": "load_adapter save_adapter",
    "gate": "ProximalGates gate_penalty penalty_at release_frozen",
    "inject": "inject unload",
    "layers": "SelectiveLoRALinear gates_on_device",
    "merging": "merge merge_and_unload unmerge",
    "model": "active_blocks disabled parameter_groups summary",
    "selection": "freeze_gates keep_blocks",
}
_HOMES = {name: f"slora.{module}" for module, names in _LAZY.items() for name in names.split()}

# Modules that `import slora` alone gives as attributes, too: those of the core, and what users of the library call.
_MODULES = (
    "adapter adapter_fit adapter_tensors evaluation features files fitting gate gate_rule layers locks lost merging "
    "model modes names ops peft_format places plain reading reads reference retention saved selection sharded signals "
    "targets training unreached wide wrappers"
).split()

# Those that a user calls by themselves; all others serve them.
_PUBLIC = (
    "config errors evaluation features gate layers merging ops reference report retention selection training"
).split()

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            value = getattr(importlib.import_module(_HOMES[name]), name)
            globals()[name] = value
            return value
        if name in _MODULES:
            return importlib.import_module(f"slora.{name}")
        raise AttributeError(f"module 'slora' has no attribute {name!r}")


def __dir__() -> list[str]:
    own = [name for name in globals() if name.startswith("__")]
    return sorted({*own, *__all__, *_PUBLIC})


class _Package(ModuleType):
    """This package: its name `inject` is the function, also after the import of the submodule of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Python binds a submodule to its package when it is first imported.
        if name == "inject" and isinstance(value, ModuleType):
            value = value.inject
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
