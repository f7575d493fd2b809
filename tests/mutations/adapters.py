"""Adapter directories, read by `slora.load_adapter` into a plain model and into an adapted one."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

import slora
from slora.layers import LoRABlocks, adapted_layers
from tests.mutations.generator import Files, read
from tests.mutations.trials import Kind

WEIGHTS, SELECTIVE = "adapter_model.safetensors", "selective.json"
PREFIX = "base_model.model."
CONFIG = slora.SelectiveLoRAConfig(
    r=2,
    lora_alpha=4,
    target_modules=["qkv", "proj", "attention", "out"],
    modules_to_save=["head", "norm", "scale"],
    rank_pattern={"proj": 3},
    alpha_pattern={"out": 5.5},
)


class Tiny(nn.Module):
    """One layer of every kind that is adapted, and modules and a parameter that are trained in full."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.out = nn.Linear(8, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.tensor(1.0))


@functools.cache
def _base() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Tiny()


def plain() -> nn.Module:
    """The same model at every call."""
    return copy.deepcopy(_base())


def _trained(seed: int) -> nn.Module:
    """An adapted model after training, so to speak; some of its blocks are off."""
    model = slora.inject(plain(), CONFIG)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
            layer.gate.copy_(torch.rand(layer.gate.shape, generator=generator) * 0.3)
        model.qkv.gate.copy_(torch.tensor([0.3, 0.05, 0.1]))
        model.out.gate.fill_(0.05 * seed)
        model.head.weight.copy_(torch.randn(3, 6, generator=generator))
        model.norm.num_batches_tracked.fill_(7)
    return model


def _files(seed: int) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        slora.save_adapter(_trained(seed), folder)
        return read(Path(folder))


def kind() -> Kind:
    """Return adapters as a kind of files."""
    return Kind(_files(1), _files(3), _sealed, Attempt())


def _sealed(files: Files) -> Files:
    """Without the digest of the tensors, as in a directory that was written before there was one."""
    try:
        content = json.loads(files[SELECTIVE])
        del content["tensors_digest"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return files
    return files | {SELECTIVE: json.dumps(content).encode()}


class Attempt:
    """Loads into models that are used again as long as they stay as they were."""

    def __init__(self) -> None:
        self._ready: dict[str, nn.Module] = {}
        self._before: dict[str, Any] = {}

    def __call__(self, folder: Path) -> bool:
        """See `Kind.attempt`; loaded means by at least one of the models, since an adapted one has its own settings."""
        plain, adapted = (self._load(folder, target) for target in ("plain", "adapted"))
        return plain or adapted

    def _load(self, folder: Path, target: str) -> bool:
        model = self._ready.pop(target, None)
        if model is None:
            model = plain() if target == "plain" else slora.inject(plain(), CONFIG)
            self._before[target] = snapshot(model)
        try:
            slora.load_adapter(model, folder)
        except slora.SLoRAError:
            changed = differences(self._before[target], snapshot(model))
            assert not changed, f"refused, but the {target} model has another {changed}"
            self._ready[target] = model
            return False
        check(model, folder)
        return True


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What must be as before after a refusal: values bit for bit, modules, `requires_grad`, and what slora notes."""
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()],
        "values": {name: bits(value.clone()) for name, value in model.state_dict().items()},
        "notes": (model.__dict__.get("_slora"), [(m.gate_cache.asked, m.released) for _, m in adapted_layers(model)]),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the entries of two snapshots that differ."""
    found = [key for key in before if key != "values" and before[key] != after[key]]
    one, two = before["values"], after["values"]
    found += sorted(one.keys() ^ two.keys())
    return found + [name for name in one.keys() & two.keys() if not torch.equal(one[name], two[name])]


def bits(value: Tensor) -> Tensor:
    """Return the bytes of a tensor, in which NaN equals itself."""
    return value.contiguous().reshape(-1).view(torch.uint8)


def check(model: nn.Module, folder: Path) -> None:
    """Compare an adapted model with what the files say, read here once more."""
    content = json.loads((folder / SELECTIVE).read_text())
    tensors = load((folder / WEIGHTS).read_bytes())
    layers = dict(adapted_layers(model))
    assert layers.keys() == content["layers"].keys()
    for name, layer in layers.items():
        entry = content["layers"][name]
        gate = torch.tensor(entry["gate"], dtype=torch.float32)
        assert torch.equal(layer.gate, gate), f"the gate of {name!r}"
        assert gate.isfinite().all(), f"the gate of {name!r}"
        threshold = torch.tensor(content["config"]["threshold"], dtype=torch.float32)
        active = [i for i, value in enumerate(gate) if value >= threshold]
        assert layer.threshold == float(content["config"]["threshold"])
        assert active == entry["active"] == list(layer.activity().active), f"active blocks of {name!r}"
        assert (layer.r, layer.blocks) == (entry["r"], entry["blocks"]), f"the rank or the blocks of {name!r}"
        _check_matrices(name, layer, active, tensors)
    buffers = {name for name, _ in model.named_buffers()}
    for name, value in model.state_dict().items():
        if name.partition(".")[0] in ("head", "norm", "scale"):
            saved = tensors.pop(PREFIX + name)
            assert torch.equal(value, saved.to(value.dtype)), name
            assert value.isfinite().all() or (name in buffers and not value.isnan().any()), name
    assert not tensors, "tensors that were not used"
    for name, parameter in _base().named_parameters():
        if name.partition(".")[0] not in ("head", "norm", "scale"):
            assert torch.equal(parameter, model.get_parameter(name)), f"the base's {name}"


def _check_matrices(name: str, layer: LoRABlocks, active: list[int], tensors: dict[str, Tensor]) -> None:
    r, n = layer.r, layer.lora_B.shape[1]
    if active:
        A, B = (tensors.pop(f"{PREFIX}{name}.lora_{letter}.weight").float() for letter in "AB")
        for j, i in enumerate(active):
            assert torch.equal(layer.lora_A[i], A[j * r : (j + 1) * r]), f"A of {name!r}"
            assert torch.equal(layer.lora_B[i], B[i * n : (i + 1) * n, j * r : (j + 1) * r]), f"B of {name!r}"
    assert layer.lora_A.isfinite().all(), f"A of {name!r}"
    assert layer.lora_B.isfinite().all(), f"B of {name!r}"
