"""The operator in Triton kernels and cuBLAS calls, by the algorithm that is the fastest for the shape.

Which one that is (`algorithms`) is measured (`autotune`): for eager mode, where the host knows the active blocks, and
separately for graphs, where only the device does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slora.ops.backends import Gradients, Needs, autotune, eager
from slora.ops.backends.algorithms import (
    Algorithm,
    Forward,
    InputGradient,
    Key,
    Operation,
    WeightGradients,
    describe_key,
    host_known,
)
from slora.ops.layout import fp32_gate, rows
from slora.ops.operands import LoRAOperands

# As `kernels/packed.py` and `kernels/configs.py` have them, which import Triton.
MAX_BLOCKS, MAX_RANK = 64, 256


class Triton:
    """The backend of kernels and cuBLAS; see the head of this file. With `pinned` it never measures."""

    name = "triton"

    def __init__(self, pinned: bool = False) -> None:
        self.pinned = pinned

    def supports(self, x: Tensor, operands: LoRAOperands | None) -> bool:
        """bf16 and fp16 (in the interpreter also fp32); K and n that are multiples of 8; up to 64 blocks of rank up to
        256; at least one row and one active block. Without operands, to sample rows, any x."""
        if operands is None:
            return x.numel() > 0
        if x.dtype not in (torch.bfloat16, torch.float16) and (x.is_cuda or x.dtype != torch.float32):
            return False
        (blocks, r, K), n = operands.lora_A.shape, operands.n
        fits = blocks <= MAX_BLOCKS and 0 < r <= MAX_RANK and operands.packed > 0
        return fits and K > 0 and n > 0 and K % 8 == n % 8 == 0 and x.numel() > 0

    def cast(self, operands: LoRAOperands, dtype: torch.dtype) -> LoRAOperands:
        """Return `operands.cast(dtype)`, by one launch."""
        A, B = operands[:2]
        if A.dtype == dtype:
            return operands
        from slora.kernels import cast, launch

        if not (launch.is_dense(A) and launch.is_dense(B)):
            return operands.cast(dtype)
        A, B = cast.cast(A, B, dtype)
        return LoRAOperands(A, B, *operands[2:])

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, operands: LoRAOperands) -> tuple[Tensor, Tensor]:
        """Return `(y [..., N], S [M, packed * r])`."""
        from slora.kernels import launch

        r, operands = operands.r, _prepared(operands)
        bias = None if bias is None else launch.at_16(bias.contiguous())
        y, S = _run(Forward(launch.aligned(rows(x)), launch.aligned(weight), bias, operands), self.pinned)
        if operands.r != r:
            S = S.view(len(S), -1, operands.r)[:, :, :r].flatten(1)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0]), S

    def backward(
        self, dy: Tensor, x: Tensor | None, S: Tensor, weight: Tensor, operands: LoRAOperands, needs: Needs
    ) -> Gradients:
        """Return the gradients."""
        from slora.kernels import launch, skinny

        r, operands = operands.r, _prepared(operands)
        dy = launch.aligned(dy)
        dx = T = None
        if needs.x:
            dx, T = _run(InputGradient(dy, launch.aligned(weight), None, operands), self.pinned)
        elif needs.lora_A:
            T = skinny.products(dy, operands, forward=False)
        if not any(needs[1:]):
            return Gradients(dx, None, None, None)
        if operands.r != r and (needs.lora_B or needs.gate):
            S = F.pad(S.view(len(S), -1, r), (0, operands.r - r)).flatten(1)
        x = launch.aligned(x) if x is not None and needs.lora_A else None
        dA, dB, dgate = _run(WeightGradients(x, dy, launch.at_16(S), T, operands, needs), self.pinned)
        if operands.r != r:
            dA, dB = dA if dA is None else dA[:, :r], dB if dB is None else dB[:, :, :r].contiguous()
        return Gradients(dx, dA, dB, dgate)

    def sample_rows(self, x: Tensor, m: int, seed: int, seed_offset: Tensor | None) -> Tensor:
        """Return the rows by one kernel that also draws their numbers: a dozen small launches in PyTorch."""
        if x.stride(1) != 1:
            return eager.EAGER.sample_rows(x, m, seed, seed_offset)
        from slora.kernels import gate_probe

        return gate_probe.sample_rows(x, m, seed, seed_offset)

    def gate_probe(
        self, dy: Tensor, x: Tensor, operands: LoRAOperands, blocks: Sequence[int] | None, seed: int,
        seed_offset: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Return `dgate` by one kernel that finds the inactive blocks and the rows of dy by itself."""
        from slora.kernels import gate_probe, launch

        return gate_probe.gate_probe(launch.aligned(dy), launch.aligned(x), _prepared(operands), seed, seed_offset)


def _prepared(operands: LoRAOperands) -> LoRAOperands:
    """The operands as the kernels need them: contiguous matrices of a rank that is a multiple of 8, gates in fp32; all
    at multiples of 16 bytes."""
    from slora.kernels import launch

    A, B, gate = operands[:3]
    if gate.dtype == torch.float32 and A.shape[1] % 8 == 0 and all(map(launch.is_dense, (A, B, gate))):
        return operands
    gate, threshold = fp32_gate(gate, operands.threshold)
    if missing := -A.shape[1] % 8:
        A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
    A, B = launch.at_16(A.contiguous()), launch.at_16(B.contiguous())
    return LoRAOperands(A, B, launch.at_16(gate), threshold, *operands[4:])


# The algorithm of every call so far, by key, rows, device and setting: a layer asks three times per step, which should
# neither list the candidates again nor read the file.
_chosen: dict[Key, Algorithm] = {}


def _run(operation: Operation, pinned: bool) -> Any:
    return operation.compute(_algorithm(operation, pinned))


def _algorithm(operation: Operation, pinned: bool) -> Algorithm:
    """The first candidate if `pinned`, else the fastest."""
    rows, key = operation.rows, operation.key
    M, device = rows.shape[0], rows.device
    cache_key = key, autotune.bucket(M), device, pinned or torch.are_deterministic_algorithms_enabled()
    algorithm = _chosen.get(cache_key)
    if algorithm is None:
        candidates = {str(algorithm): algorithm for algorithm in operation.algorithms()}
        name: str | None = next(iter(candidates))
        if not pinned:
            calls = {name: functools.partial(operation.compute, algorithm) for name, algorithm in candidates.items()}
            name = autotune.choose(describe_key(key), M, device, calls, eager=host_known(key))
        if name is None:
            return next(iter(candidates.values()))
        algorithm = _chosen[cache_key] = candidates[name]
    return algorithm
