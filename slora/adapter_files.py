"""The files of an adapter directory. Nothing here imports torch."""

from __future__ import annotations

WEIGHTS, CONFIG, SELECTIVE = "adapter_model.safetensors", "adapter_config.json", "selective.json"
# What PEFT puts before the names of modules.
PREFIX = "base_model.model."

# Of selective.json.
FORMAT = 1
