"""Checks of the operator's arguments: the same for every backend and for fake tensors, with the same messages."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from slora.errors import ShapeError
from slora.ops.operands import LoRAOperands

MAX_RANK = 256
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `x` fits a layer whose operands were checked with another x: checks what can differ from call to call."""
    return x.dim() > 0 and x.shape[-1] == weight.shape[1] and x.dtype == weight.dtype and x.device == weight.device


def check_operands(x: Tensor, weight: Tensor, bias: Tensor | None, operands: LoRAOperands) -> None:
    """Raise `ShapeError` unless the arguments fit together."""
    if x.dtype not in DTYPES:
        raise ShapeError(f"x has {_kind(x)}; expected one of {', '.join(map(str, DTYPES))}")
    lora_A, lora_B, gate = operands[:3]
    _check_shapes(x, weight, bias, lora_A, lora_B, gate)
    others = {"weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B, "gate": gate}
    _check_dtypes(x, others)
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ShapeError(
                f"{name} of shape {_shape(tensor)} is on {tensor.device} but x of shape {_shape(x)} is on {x.device}; "
                f"move the module or the input"
            )
    blocks, active = gate.shape[0], operands.active
    if active and not (active[0] >= 0 and active[-1] < blocks and all(i < j for i, j in itertools.pairwise(active))):
        raise ShapeError(f"active is {list(active)}; expected the active ones of {blocks} blocks in rising order")
    if operands.dropout != 0.0:
        _check_dropout(x, operands.dropout, operands.seed)
    _check_active(gate, operands.threshold, active)


def _check_active(gate: Tensor, threshold: float, active: Sequence[int] | None) -> None:
    """Refuse `active` where it disagrees with gates whose values the host has: on the CPU, not traced."""
    if active is None or gate.device.type != "cpu" or torch.compiler.is_compiling() or is_fake(gate):
        return
    if torch._C._current_graph_task_id() != -1:
        # Activation checkpointing recomputes a forward with the blocks of the first one; gates may have changed since.
        return
    found = (gate >= threshold).nonzero().flatten().tolist()
    if list(active) != found:
        raise ShapeError(
            f"active is {list(active)} but gate {gate.tolist()} has {found} at or above threshold={threshold}; list "
            f"these, or pass active=None"
        )


def check_input(x: Tensor, weight: Tensor) -> None:
    """Raise `ShapeError` unless there is a product of x and weight."""
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"x has shape {_shape(x)} and weight {_shape(weight)}; expected x [..., K] and weight [N, K] of one K"
        )


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, gate: Tensor) -> None:
    check_input(x, weight)
    out_features, in_features = weight.shape
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != out_features):
        raise ShapeError(f"bias has shape {_shape(bias)}; expected [{out_features}], the rows of weight")
    if gate.dim() != 1 or gate.shape[0] < 1:
        raise ShapeError(f"gate has shape {_shape(gate)}; expected [blocks] with at least one block")
    blocks = gate.shape[0]
    if out_features % blocks:
        raise ShapeError(f"gate has {blocks} blocks, which does not divide the {out_features} rows of weight")
    if lora_A.dim() != 3 or lora_A.shape[0] != blocks or lora_A.shape[2] != in_features:
        raise ShapeError(f"lora_A has shape {_shape(lora_A)}; expected [{blocks}, r, {in_features}]")
    r = lora_A.shape[1]
    if not 1 <= r <= MAX_RANK:
        raise ShapeError(f"lora_A has shape {_shape(lora_A)}, rank {r}; expected a rank from 1 to {MAX_RANK}")
    if tuple(lora_B.shape) != (blocks, out_features // blocks, r):
        raise ShapeError(f"lora_B has shape {_shape(lora_B)}; expected [{blocks}, {out_features // blocks}, {r}]")


def _check_dtypes(x: Tensor, others: Mapping[str, Tensor | None]) -> None:
    for name in ("weight", "bias"):
        tensor = others[name]
        if tensor is not None and tensor.dtype != x.dtype:
            raise ShapeError(
                f"{name} has {_kind(tensor)} but x has {_kind(x)}; run under torch.autocast or cast one of them"
            )
    A, B, gate = others["lora_A"], others["lora_B"], others["gate"]
    assert A is not None
    assert B is not None
    assert gate is not None
    if A.dtype not in (x.dtype, torch.float32) or B.dtype != A.dtype:
        expected = " or ".join(map(str, dict.fromkeys((x.dtype, torch.float32))))
        raise ShapeError(f"lora_A has {_kind(A)} and lora_B has {_kind(B)}; expected both in {expected}")
    if not gate.dtype.is_floating_point:
        raise ShapeError(f"gate has {_kind(gate)}; expected a floating one, normally torch.float32")


def _check_dropout(x: Tensor, dropout: float, seed: Tensor | None) -> None:
    if not 0.0 <= dropout < 1.0:
        raise ShapeError(f"dropout={dropout} is not a probability below 1; use 0.0 for none")
    remedy = f"draw one with torch.randint(2**62, (), device={str(x.device)!r})"
    if seed is None:
        raise ShapeError(f"seed is None with dropout={dropout}; {remedy}")
    if seed.dim() != 0 or seed.dtype != torch.int64:
        raise ShapeError(f"seed has {_kind(seed)}; expected an int64 scalar: {remedy}")
    if seed.device != x.device:
        raise ShapeError(f"seed is on {seed.device} but x of shape {_shape(x)} is on {x.device}; {remedy}")


def _kind(tensor: Tensor) -> str:
    return f"shape {_shape(tensor)} and dtype {tensor.dtype}"


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
