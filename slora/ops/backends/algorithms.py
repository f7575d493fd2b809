"""The algorithms of the Triton backend: kernels and cuBLAS products that compute an operation, alone or together.

| algorithm | y | dx |
|---|---|---|
| `fused` | S inside the main loop of the base product | T inside the main loop |
| `split` | `fused` on the first column tile of each block, `precomputed` on the others | likewise |
| `precomputed` | S by a skinny product, then base product and update in one kernel | T likewise |
| `cublas_after` | S by a skinny product, base product by cuBLAS, `addmm_` of the update | T likewise |
| `cublas_before` | S by a skinny product, the update, the base product added to it by cuBLAS | T likewise |

All of them leave the same S and T, so that forward and backward may run different ones. With several blocks dx is not
`fused`. dA, dB and the gates' gradients are one pass over x and dy (`one_pass`).

`Forward`, `InputGradient` and `WeightGradients` are the three operations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slora.ops.backends import Needs, eager
from slora.ops.layout import select_blocks, zero_inactive
from slora.ops.operands import LoRAOperands

Key = tuple[Any, ...]


class Algorithm(NamedTuple):
    """One way to compute an operation."""

    name: str
    tiles: tuple[Any, ...] = ()
    """Tile sizes of its kernels."""

    def __str__(self) -> str:
        return " ".join([self.name, *map(str, self.tiles)])


@dataclasses.dataclass(slots=True, eq=False)
class Linear:
    """`(y [M, N], S [M, packed * r])` of x, or `(dx [M, K], T [M, packed * r])` of dy."""

    rows: Tensor
    """x or dy."""
    W: Tensor
    bias: Tensor | None
    operands: LoRAOperands
    forward: ClassVar[bool]

    @property
    def key(self) -> Key:
        """What the choice of an algorithm depends on, besides the number of rows and the device."""
        name, options = ("forward", [self.bias is not None]) if self.forward else ("input gradient", [])
        return _key(name, self.rows, self.operands, *options)

    def algorithms(self) -> list[Algorithm]:
        """Return the candidates, the best guess among our kernels first."""
        from slora.kernels import configs, launch

        operands, arch = self.operands, launch.arch(self.rows.device)
        blocks, r = operands.blocks, operands.r
        columns, width = (operands.n, r) if self.forward else (self.W.shape[1], operands.packed * r)
        masked = not self.forward and operands.dropout > 0.0

        def tiles(variant: Any, R: int) -> list[Any]:
            # Tiles of which more than an eighth would be outside the columns come last.
            return sorted(configs.gemm(arch, variant, R), key=lambda tile: 8 * (-columns % tile.BN) > columns)

        fused, others = [], tiles("masked" if masked else "precomputed", configs.padded(width))
        if r <= configs.MAX_FUSED_RANK and not operands.dropout and (self.forward or blocks == 1):
            fused = tiles("fused", configs.padded(r))
        algorithms = [
            *(Algorithm("split", (first, tile)) for first in fused[:1] for tile in others if columns > first.BN),
            *(Algorithm("fused", (tile,)) for tile in fused),
            *(Algorithm("precomputed", (tile,)) for tile in others),
        ]
        # With a dropout mask on dx, cuBLAS would have to write the update to memory first.
        if _known_or_single(operands) and not masked:
            algorithms.append(Algorithm("cublas_after"))
            if blocks == 1 or not self.forward:
                algorithms.append(Algorithm("cublas_before"))
        return algorithms

    def compute(self, algorithm: Algorithm) -> tuple[Tensor, Tensor]:
        """Return the result by one of `algorithms`."""
        from slora.kernels import linear, skinny

        rows, W, bias, operands, forward = self.rows, self.W, self.bias, self.operands, self.forward
        if algorithm.name == "fused":
            return linear.fused(rows, W, bias, operands, *algorithm.tiles, forward=forward)
        factor = operands.lora_B if forward else select_blocks(*_zeroed(operands.lora_A, operands)).view(-1, W.shape[1])
        if algorithm.name == "split":
            first, others = algorithm.tiles
            out, low = linear.fused(rows, W, bias, operands, first, forward=forward, first_tile=True)
            linear.precomputed(rows, W, bias, low, factor, operands, others, forward=forward, out=out, begin=first.BN)
            return out, low
        low = skinny.products(rows, operands, forward=forward)
        if algorithm.name == "precomputed":
            return linear.precomputed(rows, W, bias, low, factor, operands, *algorithm.tiles, forward=forward), low
        # With cuBLAS, the update of dx is one product over all packed blocks.
        (B, active), right = (_zeroed(factor, operands), W.T) if forward else ((factor.T[None], (0,)), W)
        if algorithm.name == "cublas_after":
            out = F.linear(rows, right.T, bias)
            eager.add_update(out, low, B, active, operands.factor)
            return out, low
        # Rounded once more than in `fused`, but before the base product is added: by a unit of the update and the bias.
        start, beta = (B[0, 0, 0], 0) if bias is None else (bias, 1)
        return torch.addmm(start, low, B[0].T, beta=beta, alpha=operands.factor).addmm_(rows, right), low


class Forward(Linear):
    """y and S of x."""

    forward = True


class InputGradient(Linear):
    """dx and T of dy, without a bias."""

    forward = False


class WeightGradients(NamedTuple):
    """`(dA, dB, dgate)`, None for each that is not needed."""

    x: Tensor | None
    rows: Tensor
    """dy."""
    S: Tensor
    T: Tensor | None
    operands: LoRAOperands
    needs: Needs

    @property
    def key(self) -> Key:
        """See `Linear.key`."""
        return _key("weight gradients", self.rows, self.operands, *self.needs[1:])

    def algorithms(self) -> list[Algorithm]:
        """See `Linear.algorithms`."""
        from slora.kernels import configs, launch, weight_gradients

        operands = self.operands
        low = weight_gradients.low_width(operands.packed * operands.r if self.needs.lora_A else operands.r)
        tiles = configs.weight_gradients(launch.arch(self.rows.device), low)
        return [Algorithm("one_pass", (tile,)) for tile in tiles]

    def compute(self, algorithm: Algorithm) -> tuple[Tensor | None, ...]:
        """Return the result by one of `algorithms`."""
        from slora.kernels import weight_gradients

        x, dy, S, T, operands, needs = self
        return weight_gradients.weight_gradients(x, dy, S, T, operands, needs[1:], *algorithm.tiles)


Operation = Linear | WeightGradients


def _known_or_single(operands: LoRAOperands) -> bool:
    """Whether algorithms of cuBLAS are candidates. Where only the device knows the active blocks, they compute all.

    Chosen while all of several blocks are active, they would go on computing every update after most blocks have been
    switched off; with a single block only that one update can be wasted.
    """
    return operands.active is not None or operands.blocks == 1


def _zeroed(values: Tensor, operands: LoRAOperands) -> tuple[Tensor, Sequence[int]]:
    """Return `values [blocks, ...]` and the blocks that cuBLAS computes: the active ones, or all where only the device
    knows which are active, then with zeros for the inactive ones."""
    if operands.active is not None:
        return values, operands.active
    return zero_inactive(values, operands.gate >= operands.threshold), range(operands.blocks)


_FIELDS = ("operation", "K", "N", "blocks", "packed", "r", "dtype", "dropout", "host_known", "options")


def _key(operation: str, rows: Tensor, operands: LoRAOperands, *options: bool) -> Key:
    (blocks, r, K), active = operands.lora_A.shape, operands.active
    return (operation, K, blocks * operands.n, blocks, operands.packed, r, rows.dtype, operands.dropout > 0,
            active is not None, options)  # fmt: skip


def describe_key(key: Key) -> str:
    """Return the key as text, for the file of cached choices."""
    return " ".join(f"{name}={value}" for name, value in zip(_FIELDS, key, strict=False))


def host_known(key: Key) -> bool:
    """Return whether the host knows the active blocks, as in eager mode."""
    return bool(key[_FIELDS.index("host_known")])
