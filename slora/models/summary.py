"""Which blocks of a model are active, and what they cost: `active_blocks`, `summary`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slora.errors import StateError
from slora.gates.cache import refresh_gates
from slora.gates.values import gate_values
from slora.layers import adapted_layers
from slora.models.parameter_groups import trainable_parameters
from slora.ops.flops import forward_flops, linear_flops
from slora.selection.strategy import unfinished_selection

_BASE = "the model is the base model, but for modules trained in full, such as the head"


def active_blocks(model: nn.Module) -> dict[str, Tensor]:
    """Return `{layer name: bool [blocks] on the CPU}`: which blocks exist under the present gates.

    The gates are read for this, in one copy per device. Call it after a write to them that increments no version
    counter, such as `parameter.data.copy_(...)`, and before a forward in the same mode; slora notices all others.
    """
    refresh_gates(model)
    return {
        name: torch.tensor([i in layer.activity().active for i in range(layer.blocks)])
        for name, layer in adapted_layers(model)
    }


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer: FLOPs are those of a forward pass for one input row."""

    name: str
    in_features: int
    out_features: int
    r: int
    blocks: int
    active: tuple[int, ...]
    lora_parameters: int
    base_flops: int
    added_flops: int
    ranks: tuple[int, ...] = ()
    """Of each block; 0 for an inactive one."""

    def shown_ranks(self, by_block: bool = False) -> str:
        """Return the rank of the layer, or those of its blocks if an active one has another, or if `by_block`."""
        return ranks_text(self.r, self.active, self.ranks, by_block)


@dataclass(frozen=True)
class Summary:
    """Blocks, parameters and FLOPs of an adapted model; `print` shows it as a table.

    Attributes:
        layers: the adapted layers in the order of the model.
        parameters: elements of all parameters, those of inactive blocks included.
        trainable: those that training can still change: `trainable_parameters`.
        gated: whether the threshold can switch blocks off at all, as it cannot where plain LoRA is trained.
        asked: the budget that the blocks were chosen by; empty where the gates decide.
        selecting: the progress of a strategy that has not made its choice yet; else empty.
        moved: whether the gates differ from each other.
    """

    layers: tuple[LayerSummary, ...]
    parameters: int
    trainable: int
    gated: bool = False
    asked: str = ""
    selecting: str = ""
    moved: bool = True

    @property
    def blocks(self) -> int:
        """Number of LoRA blocks."""
        return sum(layer.blocks for layer in self.layers)

    @property
    def active(self) -> int:
        """Number of active LoRA blocks."""
        return sum(len(layer.active) for layer in self.layers)

    def __str__(self) -> str:
        width = max([5, *(len(layer.name) for layer in self.layers)])
        by_rank = _by_rank(self.asked)
        ranks = [layer.shown_ranks(by_rank) for layer in self.layers]
        wide = max([3, *map(len, ranks)])
        lines = [
            f"{'layer':{width}}  {'in -> out':>14}  {'r':>{wide}}  {'active':>10}  {'parameters':>10}  {'FLOPs':>7}"
        ]
        for layer, rank in zip(self.layers, ranks, strict=True):
            shape = f"{layer.in_features} -> {layer.out_features}"
            marks = "".join("#" if i in layer.active else "." for i in range(layer.blocks))
            marks = marks if layer.blocks <= 10 else f"{len(layer.active)}/{layer.blocks}"
            added = 100 * layer.added_flops / layer.base_flops
            lines.append(
                f"{layer.name:{width}}  {shape:>14}  {rank:>{wide}}  {marks:>10}  "
                f"{layer.lora_parameters:>10,}  {added:>+6.2f}%"
            )
        base, added = (sum(getattr(layer, key) for layer in self.layers) for key in ("base_flops", "added_flops"))
        lines.append(
            f"{self.active} of {self.blocks} blocks active; {self.trainable:,} of {self.parameters:,} parameters "
            f"trainable ({100 * self.trainable / max(1, self.parameters):.2f} %); "
            f"{100 * added / max(1, base):+.2f} % forward FLOPs in adapted layers"
        )
        if self.selecting:
            lines.append(self.selecting)
        elif self.active == 0 or self.gated:
            lines += filter(None, [" ".join(verdict(self.active, self.blocks, self.asked, self.moved)).strip()])
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Return the blocks, parameters and FLOPs of `model`; FLOPs are per input row of each adapted layer.

    Raises:
        StateError: the model has no adapted layer.
    """
    refresh_gates(model)
    rows, gated, asked = [], False, ""
    for name, layer in adapted_layers(model):
        # No score reaches a threshold this low: method "lora" of slora.training.
        gated, asked = gated or layer.threshold > -1e8, layer.gate_cache.asked
        out_features, in_features = layer.base_weight.shape
        active = layer.activity().active
        running = 0 if layer.merged or not layer.enabled else len(active)
        base = linear_flops(1, out_features, in_features)
        added = forward_flops(1, out_features, in_features, layer.r, layer.blocks, running) - base
        count = layer.lora_A.numel() + layer.lora_B.numel() + layer.gate.numel()
        shape = in_features, out_features
        ranks = tuple(layer.block_ranks())
        rows.append(LayerSummary(name, *shape, layer.r, layer.blocks, active, count, base, added, ranks))
    if not rows:
        raise StateError("the model has no adapted layer; call slora.inject(model, config) first")
    parameters = sum(p.numel() for p in model.parameters())
    trainable = trainable_parameters(model)
    moved = len({value for values in gate_values(model).values() for value in values}) > 1
    return Summary(tuple(rows), parameters, trainable, gated, asked, unfinished_selection(model), moved)


def ranks_text(r: int, active: Sequence[int], ranks: Sequence[int], by_block: bool = False) -> str:
    """Return the rank `r` of a layer, or where an active block has another the `ranks` of all blocks: "3/./1".

    Args:
        by_block: show those of all blocks in any case.
    """
    if not by_block and all(ranks[i] == r for i in active):
        return str(r)
    return "/".join(str(rank) if i in active else "." for i, rank in enumerate(ranks))


def verdict(active: int, blocks: int, asked: str = "", moved: bool = True) -> tuple[str, str]:
    """Return what it means if none of the `blocks` are active, or all, and the remedy; else ("", "").

    Args:
        asked: the budget that asked for just that, as "budget=0" or "budget=40 ranks", or what chose ranks, as "sora",
            or "strategy all".
        moved: whether any gate has another value than the others.
    """
    if blocks and _by_rank(asked):
        # Ranks were chosen, not blocks.
        return ("", "") if active else (f"no block is active: {_BASE}; {asked} has left no rank.", "")
    if asked and blocks and active in (0, blocks):
        what = "all blocks are active" if active else f"no block is active: {_BASE}"
        if active == _wanted(asked, blocks):
            return f"{what}, as asked for by {asked}.", ""
        return f"{what}, though {asked} was asked for.", "Something has changed the gates since the choice was made."
    if blocks and not active:
        return f"no block is active: {_BASE}.", "Lower the penalty, or lengthen its warm-up."
    if blocks and active == blocks and not moved:
        return (
            "all blocks are active: no gate has moved, so this is plain LoRA.",
            "Nothing steps the gates: step slora.ProximalGates beside the optimizer, or give them a group of it with "
            "slora.parameter_groups(model, gate_lr=...).",
        )
    if blocks and active == blocks:
        return (
            "all blocks are active: no gate is below the threshold, so this is plain LoRA.",
            "Train longer, or raise the learning rate of the gates or the penalty.",
        )
    return "", ""


def _by_rank(asked: str) -> bool:
    return asked.endswith(" ranks") or (not asked.startswith(("budget=", "strategy ")) and bool(asked))


def _wanted(asked: str, blocks: int) -> int:
    if asked == "strategy all":
        return blocks
    number = asked.removeprefix("budget=")
    try:
        return int(number)
    except ValueError:
        # A share; what is no number at all is what nobody asked for.
        return math.floor(float(number) * blocks + 0.5) if re.fullmatch(r"[\d.e-]+", number) else -1
