"""The straight-through gradient of inactive gates, exact or estimated from a few rows.

`torch.ops.slora.sample_rows` and `torch.ops.slora.gate_probe` compute it by the backend for the device; `ProbeGates`
puts them into the autograd graph.

Each layer probes all its blocks in one launch. The layers of a model do not share a launch: autograd needs the gradient
of a layer's gate when it reaches that layer, where DDP, hooks and `torch.autograd.grad` use it, while a shared launch
could start only after the last layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slora.errors import ShapeError
from slora.ops.backends.eager import EAGER
from slora.ops.dispatch import backend_for
from slora.ops.dropout import mix
from slora.ops.layout import rows
from slora.ops.operands import LoRAOperands

_library: Any = torch.library.Library("slora", "FRAGMENT")
_library.define("sample_rows(Tensor x, int m, int seed, Tensor? seed_offset) -> Tensor")
_library.define(
    "gate_probe(Tensor dy, Tensor x, Tensor lora_A, Tensor lora_B, Tensor gate, float threshold, float scaling, "
    "int[]? blocks, int seed, Tensor? seed_offset) -> Tensor"
)


def sampled_rows(M: int, m: int, seed: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return `min(m, M)` row numbers below `M`, int64, rising: one random row from each of as many equal strata.

    Row j is expected exactly `m / M` times, so a sum over the sampled rows times `M / m` is an unbiased
    estimate of the sum over all. The numbers come from an integer hash of `(seed, k)`: the same on any device
    and without any generator's state. `seed` is a number or an int64 scalar on `device`.

    Raises:
        ShapeError: see `check_rows`.
    """
    if m >= M:
        return torch.arange(M, device=device)
    check_rows(M, m)
    k = torch.arange(m, dtype=torch.int64, device=device)
    u = mix(k + (seed * 0x9E3779B1 & 0xFFFFFFFF)) >> 8
    return (((k << 24) + u) * M // m) >> 24


def check_rows(M: int, m: int) -> None:
    """Raise `ShapeError` where the arithmetic of `sampled_rows` would overflow int64: from `m * M` = 2**39 on."""
    if m < M and m * M >= 2**39:
        raise ShapeError(f"m={m} of M={M} rows cannot be drawn in 64 bits; m * M must be below 2**39, so take fewer")


class ProbeGates(torch.autograd.Function):
    """The identity on `y` whose backward gives inactive gates their straight-through gradient.

    `apply(y [..., N], gate, x [..., K], lora_A, lora_B, threshold, scaling, blocks, m, seed, seed_offset)`:
    `dgate_i = scaling * <S_i, T_i>` for each i in `blocks`, from the rows `sampled_rows(M, m, seed + seed_offset)` of x
    and dy, or from all M rows where `m` is None. Where `blocks` is None the inactive ones are found on the device.
    `seed_offset` is an int64 scalar on the device, or None for 0. Only the sampled rows of x are saved.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, *call: Any) -> Tensor:
        threshold, scaling, blocks, m, seed, seed_offset = call
        x_rows = rows(x)
        if m is not None:
            x_rows = torch.ops.slora.sample_rows(x_rows, m, seed, seed_offset)
        ctx.save_for_backward(x_rows, lora_A, lora_B, gate, seed_offset)
        ctx.call = threshold, scaling, blocks, seed
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        dgate = None
        if ctx.needs_input_grad[1]:
            x_rows, lora_A, lora_B, gate, seed_offset = ctx.saved_tensors
            dgate = torch.ops.slora.gate_probe(rows(dy), x_rows, lora_A, lora_B, gate, *ctx.call, seed_offset)
            dgate = dgate.to(gate.dtype)
        return dy, dgate, None, None, None, None, None, None, None, None, None


def _sample_rows(x: Tensor, m: int, seed: int, seed_offset: Tensor | None) -> Tensor:
    check_rows(x.shape[0], m)
    return (backend_for(x) or EAGER).sample_rows(x, m, seed, seed_offset)


def _gate_probe(
    dy: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, gate: Tensor, threshold: float, scaling: float,
    blocks: Sequence[int] | None, seed: int, seed_offset: Tensor | None,
) -> Tensor:  # fmt: skip
    operands = LoRAOperands(lora_A, lora_B, gate, threshold, scaling).cast(dy.dtype)
    return (backend_for(dy, operands) or EAGER).gate_probe(dy, x, operands, blocks, seed, seed_offset)


def _sample_rows_fake(x: Tensor, m: int, seed: int, seed_offset: Tensor | None) -> Tensor:
    return x.new_empty(m, x.shape[1])


def _gate_probe_fake(dy: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, gate: Tensor, *_: Any) -> Tensor:
    return dy.new_empty(gate.shape, dtype=torch.promote_types(dy.dtype, torch.float32))


torch.library.impl(_library, "sample_rows", "CompositeExplicitAutograd")(_sample_rows)
torch.library.impl(_library, "gate_probe", "CompositeExplicitAutograd")(_gate_probe)
torch.library.register_fake("slora::sample_rows", _sample_rows_fake, lib=_library)
torch.library.register_fake("slora::gate_probe", _gate_probe_fake, lib=_library)
