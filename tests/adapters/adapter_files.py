"""Files of an adapter, how a test changes them, and flags of a model that loading may not change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import slora

FILES = ["adapter_config.json", "adapter_model.safetensors", "selective.json"]
QKV = "blocks.0.attn.qkv"
Config = slora.SelectiveLoRAConfig


def small(**settings: Any) -> Config:
    return Config(**{"r": 3, "lora_alpha": 4, **settings})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flags(model: nn.Module) -> list[tuple[str, int, bool, torch.dtype]]:
    return [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()]


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change `selective.json`."""
    path = folder / "selective.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change tensors, as in a directory that was written before there was a digest."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    edit(folder, lambda fields: fields.pop("tensors_digest", None))
