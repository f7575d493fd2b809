"""`LoRABlocks`: gated LoRA blocks on one base weight, the base class of every adapted layer.

Here are the parameters, from their making to merging and release; `projection.py` computes with them, `state.py` keeps
them through casts, copies and state dicts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slora.config import SelectiveLoRAConfig
from slora.errors import ConfigError, StateError
from slora.gates.cache import GateCache
from slora.gates.gated import Activity, GateKey
from slora.layers import optimizer_hook as _optimizer_hook  # noqa: F401 (registers itself)
from slora.layers.forward import Projection
from slora.layers.state import LORA_PARAMETERS, RANK_GATE
from slora.module_tree.sharded import full
from slora.module_tree.wrappers import named_modules
from slora.ops import flops

Update = tuple[Tensor, Tensor, float, int]
"""`A [r, K]`, `B [n, r]`, the factor, and the first row of the weight: `factor * B @ A` added to `n` rows."""

# What an adapted layer has and the base layer has not.
_OWN = {
    *LORA_PARAMETERS, RANK_GATE, "_compiled_call_impl",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "blocks", "threshold", "inactive", "probe_every", "probe_rows",
    "gate_init", "enabled", "merged", "released", "injected_name", "warned_untrained", "gate_cache", "weight_backup",
    "unmerge_updates", "_activity", "_gate_key", "_sharded_gate", "_seed", "_cast", "_ready", "_base_class",
    "_slora_reads", "_slora_unseen",
}  # fmt: skip


class LoRABlocks(Projection):
    """Base of adapted layers: the LoRA parameters beside a base weight `[N, K]`, and the product with both.

    Parameters: `lora_A [blocks, r, K]`, `lora_B [blocks, N / blocks, r]`, `gate [blocks]`, all fp32.
    A subclass names its base weight in `weight_name` and `bias_name` and calls `project` in its forward.

    Attributes:
        enabled: False inside `slora.disabled(model)`: the layer is the base layer.
        merged: True while the update is folded into the base weight.
        released: True once the policy "frozen" has freed the matrices (`slora.release_frozen`).
        weight_backup: while merged, a copy of the base weight for `slora.unmerge`, if `slora.merge` made one.
        unmerge_updates: while merged without a backup, the updates that `slora.unmerge` adds.
    """

    gate_init: float
    weight_backup: Tensor | None
    unmerge_updates: list[Update]
    _base_class: type[nn.Module]

    def _adopt(self, module: nn.Module) -> None:
        """Become a copy of `module` that shares its parameters, hooks, children and mode."""
        nn.Module.__init__(self)
        self.__dict__.update(module.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            self.__dict__[registry] = dict(module.__dict__[registry])
        # A compiled call is bound to `module`: the layer is compiled as a part of its model, or once more by itself.
        self._compiled_call_impl = None
        self._base_class = type(module)

    def plain(self) -> nn.Module:
        """Return a module of the class that was adapted, sharing the base parameters, without the blocks."""
        module = self._base_class.__new__(self._base_class)
        nn.Module.__init__(module)
        module.__dict__.update({key: value for key, value in self.__dict__.items() if key not in _OWN})
        for registry in ("_parameters", "_buffers", "_modules"):
            entries = self.__dict__[registry]
            module.__dict__[registry] = {key: value for key, value in entries.items() if key not in _OWN}
        return module

    def __prepare_scriptable__(self) -> Any:
        raise StateError(
            "torch.jit.script cannot read an adapted layer; call slora.merge_and_unload(model) first, or use "
            "torch.export.export or torch.jit.trace"
        )

    @classmethod
    def choose_blocks(cls, config: SelectiveLoRAConfig, module: nn.Module, name: str) -> int:
        """Return how many blocks `config` gives to `module`.

        Raises:
            ConfigError: the number or the rank does not fit the module; nothing has been changed.
        """
        weight: Tensor = getattr(module, cls.weight_name)
        out_features = weight.shape[0]
        r, limit = config.rank_of(name), min(weight.shape)
        if r > limit:
            raise ConfigError(
                f"r={r} is above min(in_features, out_features)={limit}{of_layer(name)}; lower r"
                + (", give this layer a rank_pattern entry or list it in exclude_modules" if name else "")
            )
        blocks = cls._automatic_blocks(module, name) if config.blocks == "auto" else config.blocks
        if out_features % blocks:
            raise ConfigError(
                f"blocks={blocks} does not divide out_features={out_features}{of_layer(name)}; "
                f'use a divisor or blocks="auto"'
            )
        return blocks

    @classmethod
    def _automatic_blocks(cls, module: nn.Module, name: str) -> int:
        return 1

    def _add_blocks(self, config: SelectiveLoRAConfig, blocks: int, name: str, gate_cache: GateCache | None) -> None:
        weight, r = self.base_weight, config.rank_of(name)
        out_features, in_features = weight.shape
        for parameter in (weight, self.base_bias):
            if parameter is not None:
                parameter.requires_grad_(False)
                if config.base_dtype is not None:
                    parameter.data = parameter.data.to(config.base_dtype)
        self.r, self.lora_alpha, self.use_rslora = r, config.alpha_of(name), config.use_rslora
        self.lora_dropout = config.lora_dropout
        self.blocks, self.threshold, self.gate_init = blocks, config.threshold, config.gate_init
        self.inactive, self.probe_every, self.probe_rows = (
            config.inactive,
            config.probe_every,
            config.probe_rows,
        )
        self.enabled, self.merged, self.released = True, False, False
        kwargs: dict[str, Any] = {"device": weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(blocks, r, in_features, **kwargs))
        self.lora_B = nn.Parameter(torch.empty(blocks, out_features // blocks, r, **kwargs))
        self.gate = nn.Parameter(torch.empty(blocks, **kwargs))
        self.register_parameter(RANK_GATE, None)
        LoRABlocks.reset_parameters(self)
        flops.register()
        self.weight_backup, self.unmerge_updates = None, []
        self.gate_cache = GateCache() if gate_cache is None else gate_cache
        self._activity: Activity | None = None
        self._gate_key: GateKey | None = None
        self._seed, self.injected_name = _seed_of(name), name
        self._cast, self._ready = {}, None
        self.gate_cache.add(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the blocks as `slora.inject` does: A Kaiming-uniform, B = 0, every gate `gate_init`.

        The base weight and bias stay what they are: a pretrained model's. Where `to_empty` has left them without
        values, they come from its checkpoint, before or after this call; for random ones call `reset_parameters` of
        the class that was adapted, as in `nn.Linear.reset_parameters(layer)`.

        Raises:
            StateError: the layer is merged, or its matrices were freed.
        """
        kind = type(self).__name__
        if self.merged:
            raise StateError(f"this {kind} is merged; call slora.unmerge(model) before reset_parameters")
        if self.released:
            raise StateError(f"the LoRA matrices were freed by inactive='frozen': this {kind} has none to initialise")
        # Block by block, because the bound depends on the fan-in of one. `detach`, not `.data`: the version counter has
        # to count the write.
        for A in self.lora_A.detach():
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.lora_B.zero_()
        self.gate.fill_(self.gate_init)

    @torch.no_grad()
    def merged_weight(self, scale: float = 1.0) -> Tensor:
        """Return a new `[N, K]` tensor `W + scale * c * B @ A` over the active blocks, in the dtype of `W`.

        The sum is formed in fp32 (fp64 for fp64 weights) and rounded once. Rounding `W + delta` to 16 bits
        loses part of a small update: merge for inference, never to go on training.
        """
        weight = full(self.base_weight.detach())
        if self.merged:
            return weight.clone()
        self.gate_cache.refresh()
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        result = weight.to(wide, copy=True)
        n = weight.shape[0] // self.blocks
        lora_A, lora_B = full(self.lora_A), full(self.effective_B)
        for i in self.activity().active:
            block = result[i * n : (i + 1) * n]
            block.addmm_(lora_B[i].to(wide), lora_A[i].to(wide), alpha=scale * self.scaling)
        return result.to(weight.dtype)

    def mark_merged(self, weight_backup: Tensor | None, unmerge_updates: Sequence[Update]) -> None:
        """Note that the base weight holds the update now, and what `slora.unmerge` restores it from."""
        self._cast.clear()
        self.weight_backup, self.unmerge_updates, self.merged = weight_backup, list(unmerge_updates), True

    def mark_unmerged(self) -> None:
        """Note that the base weight is the base model's again, or will never be; frees the backup."""
        self._cast.clear()
        self.weight_backup, self.unmerge_updates, self.merged = None, [], False

    def release(self) -> int:
        """Free the LoRA matrices for good and return the bytes; `slora.release_frozen` calls this."""
        freed = 0
        self.rank_gate = None
        for parameter in (self.lora_A, self.lora_B):
            freed += parameter.nbytes + (0 if parameter.grad is None else parameter.grad.nbytes)
            parameter.requires_grad_(False)
            parameter.grad = None
        self.gate.requires_grad_(False)
        self.gate.grad = None
        out_features, in_features = self.base_weight.shape
        self.lora_A.data = self.lora_A.data.new_empty(self.blocks, 0, in_features)
        self.lora_B.data = self.lora_B.data.new_empty(self.blocks, out_features // self.blocks, 0)
        self.released = True
        return freed

    def _describe(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, blocks={self.blocks}, inactive={self.inactive!r}"


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRABlocks]]:
    """Yield `(name, layer)` for every adapted layer of `model`, in the order of `named_modules`.

    Names are those in the plain model, whatever wraps it or its parts (`slora.module_tree.wrappers`).
    """
    for name, module in named_modules(model):
        if isinstance(module, LoRABlocks):
            yield name, module


def of_layer(name: str) -> str:
    """Return `name` as the end of a sentence; a layer made by hand has none."""
    return f" of {name!r}" if name else ""


def _seed_of(name: str) -> int:
    """A number that differs between layers and is the same in every run."""
    seed = 0
    for byte in name.encode():
        seed = (seed * 131 + byte) & 0xFFFFFFFF
    return seed
