"""slora: fine-tuning by selective low-rank adaptation.

A pretrained model gets gated LoRA blocks, training decides which few of them exist, and the rest of the model
stays what it was. Start with `inject`; `slora.reference` states the mathematics.
"""

from slora.adapter import load_adapter, save_adapter
from slora.config import SelectiveLoRAConfig
from slora.errors import (
    BaseModelWarning,
    CheckpointError,
    ConfigError,
    DataError,
    GateRuleWarning,
    MissingDependencyError,
    NonFiniteLossError,
    ShapeError,
    SLoRAError,
    StateError,
    TargetError,
    WriteError,
)
from slora.gate import ProximalGates, gate_penalty, penalty_at, release_frozen
from slora.inject import inject, unload
from slora.layers import SelectiveLoRALinear, gates_on_device
from slora.merging import merge, merge_and_unload, unmerge
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
    "NonFiniteLossError",
    "ProximalGates",
    "SLoRAError",
    "SelectiveLoRAConfig",
    "SelectiveLoRALinear",
    "ShapeError",
    "StateError",
    "TargetError",
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
