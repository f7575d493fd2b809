"""S and T by themselves, for the algorithms that read them: products with the few columns of a LoRA block.

    S_i = (x . mask) A_i^T              x [M, K],  A [blocks, r, K]
    T_i = dy[:, block i] B_i            dy [M, N], B [blocks, n, r]

by packed block index (`kernels/packed.py`), side by side: [M, packed * r]. x is read once per packed block, dy once,
from device memory or, by the programs of the same rows side by side, from L2; A and B, small, come from L2. Sums are
fp32, rounded once. The columns of an inactive block are written as 0 without reading its A, B or columns of dy.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from slora.kernels import configs, launch, tiles
from slora.kernels import dropout as counter
from slora.kernels import packed as blocks_of
from slora.kernels.launch import Launch
from slora.ops.dropout import drop_units
from slora.ops.operands import LoRAOperands


@triton.jit
def product(
    rows, inside, factor, valid, depth, stride_k, a, b, key2, drop,
    DROPOUT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Return `depth` columns of the rows at `rows [BM, 1]` times a matrix of R columns, those at `factor [1, R]`.

    Its rows are `stride_k` apart. Rows that are not `inside [BM]` and columns that are not `valid [R]` are not read.
    """
    acc = tl.zeros((BM, R), tl.float32)
    for first in range(0, depth, BK):
        k = first + tl.arange(0, BK)
        tile = tl.load(rows + k[None, :], mask=inside[:, None] & (k < depth)[None, :], other=0.0)
        if DROPOUT:
            tile = tl.where(counter.keep(a, b, key2, first, drop, BK), tile, 0.0)
        right = tl.load(factor + k[:, None] * stride_k, mask=(k < depth)[:, None] & valid[None, :], other=0.0)
        acc = tl.dot(tile, right, acc)
    return acc


@triton.jit(do_not_specialize=["drop", "M", "blocks", "packed"])
def skinny(
    x, low, out, gate, seed, threshold, drop, M, depth, step, r, blocks, packed, stride_x, stride_k, stride_j,
    DROPOUT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Program `row tile * packed + index`: BM rows of the products of one block with `depth` columns of x.

    Those of block i start at `i * step`. Element (k, j) of its factor is at `i * depth * r + k * stride_k +
    j * stride_j` of low.
    """
    depth, step, r, stride_x = tiles.eights(depth), tiles.eights(step), tiles.eights(r), tiles.eights(stride_x)
    rows = tl.program_id(0) // packed * BM + tl.arange(0, BM)
    index = tl.program_id(0) % packed
    j = tl.arange(0, R)
    block, active = blocks_of.block_of(index, gate, threshold, blocks, packed)
    acc = tl.zeros((BM, R), tl.float32)
    if active:
        a, b, key2 = 0, 0, 0
        if DROPOUT:
            key0, key1, key2 = counter.keys(tl.load(seed))
            a, b = counter.row_keys(key0, key1, rows)
        x_rows = x + rows[:, None].to(tl.int64) * stride_x + block * step
        factor = low + tl.cast(block, tl.int64) * depth * r + j[None, :] * stride_j
        acc = product(x_rows, rows < M, factor, j < r, depth, stride_k, a, b, key2, drop, DROPOUT, BM, BK, R)
    tiles.store_low(
        out + index * r, acc.to(out.dtype.element_ty), tl.program_id(0) // packed * BM, M, r, packed * r, BM, R
    )


def products(rows: Tensor, operands: LoRAOperands, *, forward: bool) -> Tensor:
    """Return S of x, or T of dy, `[M, packed * r]`; arguments as for `linear.fused`, any rank, for S dropout too."""
    A, B, gate, threshold, _, _, p, seed = operands
    M, (blocks, r, K), packed, dropout = rows.shape[0], A.shape, operands.packed, forward and p > 0.0
    out = rows.new_empty(M, packed * r)
    if out.numel() == 0:
        return out
    launch_skinny = _skinny(
        rows.device, rows.dtype, M, K, B.shape[1], blocks, r, packed, rows.stride(0), forward, dropout, drop_units(p)
    )
    launch_skinny(rows, A if forward else B, out, gate, seed if dropout else None, threshold)
    return out


@functools.lru_cache(maxsize=1024)
def _skinny(
    device: torch.device, dtype: torch.dtype, M: int, K: int, n: int, blocks: int, r: int, packed: int, stride: int,
    forward: bool, dropout: bool, drop: int,
) -> Launch:  # fmt: skip
    R = configs.padded(r)
    tile = configs.skinny(M // launch.sms(device), R)
    depth, step, stride_k, stride_j = (K, 0, 1, K) if forward else (n, n, r, 1)
    return Launch(
        skinny, device, (launch.cdiv(M, tile.BM) * packed, 1, 1),
        (dtype, M >> 31, K, n, r, stride, forward, dropout, tile),
        [drop, M, depth, step, r, blocks, packed, stride, stride_k, stride_j],
        {"DROPOUT": dropout, "R": R, **tile.meta()},
    )  # fmt: skip
