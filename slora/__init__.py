"""slora: fine-tuning by selective low-rank adaptation.

A pretrained model gets gated LoRA blocks, training decides which few of them exist, and the rest of the model
stays what it was. Start with `inject`; `slora.reference` states the mathematics. README.md, "Where things are", says
what each package holds.

Modules that need torch are imported at first use, so that the command line reports a typo at once. The operators are
registered then, too: before you load an exported program, `import slora.layers`.
"""

import importlib
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
    from slora.adapters.compress import compress_adapter, decompress_adapter
    from slora.adapters.save_load import load_adapter, save_adapter
    from slora.gates import ProximalGates, gate_penalty, penalty_at, release_frozen
    from slora.layers import SelectiveLoRALinear, gates_on_device
    from slora.merging.merge import merge, merge_and_unload, unmerge
    from slora.models.disabled import disabled
    from slora.models.inject import inject, unload
    from slora.models.parameter_groups import parameter_groups
    from slora.models.summary import active_blocks, summary
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
    "compress_adapter",
    "decompress_adapter",
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
    "adapters.compress": "compress_adapter decompress_adapter",
    "adapters.save_load": "load_adapter save_adapter",
    "gates": "ProximalGates gate_penalty penalty_at release_frozen",
    "layers": "SelectiveLoRALinear gates_on_device",
    "merging": "merge merge_and_unload unmerge",
    "models.disabled": "disabled",
    "models.inject": "inject unload",
    "models.parameter_groups": "parameter_groups",
    "models.summary": "active_blocks summary",
    "selection": "freeze_gates keep_blocks",
}
_MODULE_OF = {name: f"slora.{module}" for module, names in _LAZY.items() for name in names.split()}

# Packages that are attributes after `import slora` alone.
_PACKAGES = (
    "adapters clip evaluation gates io layers merging models module_tree ops reference report retention runs selection "
    "sources training"
).split()

# Modules that users import from; listed by `dir(slora)`.
_PUBLIC = "config errors evaluation gates layers merging ops reference report retention selection training".split()

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _MODULE_OF:
            value = getattr(importlib.import_module(_MODULE_OF[name]), name)
            globals()[name] = value
            return value
        if name in _PACKAGES:
            return importlib.import_module(f"slora.{name}")
        raise AttributeError(f"module 'slora' has no attribute {name!r}")


def __dir__() -> list[str]:
    own = [name for name in globals() if name.startswith("__")]
    return sorted({*own, *__all__, *_PUBLIC})
