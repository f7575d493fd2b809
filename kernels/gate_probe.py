"""The straight-through gradient of inactive gates from a sample of rows.

    dgate_i = c * sum over the sampled rows of <x A_i^T, dy[:, block i] B_i>          for each inactive block i

`slora.ops.gate_probe.sampled_rows` draws the rows: one from each of m equal strata of the M rows, by a hash of (seed,
stratum). Here the same hash is drawn inside the kernels, so that no list of rows exists in memory: `sample_rows` copies
the rows of x in the forward (only they are kept until the backward), and `gate_probe` finds the same rows of dy in
place.

A program owns a few sampled rows and a block, computes S and T of both in fp32 and leaves one number; the numbers of a
block are added in a fixed order. There are no atomics. Nothing of an active block is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slora.kernels import configs, launch, tiles
from slora.kernels import dropout as counter
from slora.kernels.launch import Launch
from slora.kernels.skinny import product
from slora.ops.operands import LoRAOperands

# The widest group of columns of S and T that a program holds; larger ranks take several turns.
WIDEST = 64


def seed_word(seed: int) -> int:
    """Return what the hash adds to the number of a stratum, modulo 2**32.

    It is a signed number of 32 bits, because Triton recompiles for an argument that needs 64.
    """
    return (seed * 0x9E3779B1 + 0x80000000 & 0xFFFFFFFF) - 0x80000000


@triton.jit
def sampled_row(k, M, m, word, seed_offset):
    """Return the row drawn from stratum `k [...]`, int64, of M and m whose product is below 2**39.

    `word` is `seed_word(seed)`, and the number at `seed_offset`, if there is one, is added to that seed.
    """
    word = word.to(tl.int64)
    if seed_offset is not None:
        word += tl.load(seed_offset) * 0x9E3779B1
    u = (counter.mix((k.to(tl.int64) + word).to(tl.uint32)) >> 8).to(tl.int64)
    return (((k.to(tl.int64) << 24) + u) * M // m) >> 24


@triton.jit(do_not_specialize=["M", "m", "word"])
def copy_rows(x, out, seed_offset, M, m, K, stride_x, word, BM: tl.constexpr, BK: tl.constexpr):
    """Copy the sampled rows of x: BM x BK elements per program."""
    k = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (k < m)[:, None] & (columns < K)[None, :]
    row = tl.where(k < m, sampled_row(k, M, m, word, seed_offset), 0)
    tile = tl.load(x + row[:, None] * stride_x + columns[None, :], mask=inside)
    tl.store(out + k[:, None].to(tl.int64) * K + columns[None, :], tile, mask=inside)


@triton.jit(do_not_specialize=["M", "m", "word", "row_tiles"])
def probe(
    dy, x, A, B, gate, out, seed_offset, threshold, scaling, M, m, K, n, r, stride_dy, stride_x, word, row_tiles,
    BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Program (block, tile of sampled rows): `c <x A_i^T, dy[:, block i] B_i>` over its rows, one number."""
    K, n, r = tiles.eights(K), tiles.eights(n), tiles.eights(r)
    stride_dy, stride_x = tiles.eights(stride_dy), tiles.eights(stride_x)
    block = tl.program_id(0) // row_tiles
    total = 0.0
    if tl.load(gate + block) < threshold:
        k = tl.program_id(0) % row_tiles * BM + tl.arange(0, BM)
        inside = k < m
        row = k.to(tl.int64)
        if m < M:
            row = tl.where(inside, sampled_row(k, M, m, word, seed_offset), 0)
        x_rows = x + k[:, None].to(tl.int64) * stride_x
        dy_rows = dy + row[:, None] * stride_dy + block.to(tl.int64) * n
        for group in range(0, r, R):
            j = group + tl.arange(0, R)
            of_A = A + (block.to(tl.int64) * r + j)[None, :] * K
            of_B = B + block.to(tl.int64) * n * r + j[None, :]
            S = product(x_rows, inside, of_A, j < r, K, 1, 0, 0, 0, 0, False, BM, BK, R)
            T = product(dy_rows, inside, of_B, j < r, n, r, 0, 0, 0, 0, False, BM, BK, R)
            total += tl.sum(tl.sum(S * T, 1), 0)
    tl.store(out + tl.program_id(0), scaling * total)


def sample_rows(x: Tensor, m: int, seed: int, seed_offset: Tensor | None = None) -> Tensor:
    """Return the `[m, K]` rows of `x [M, K]` that `slora.ops.gate_probe.sampled_rows` names; m below M.

    `x` has unit column stride. `seed_offset` is an int64 scalar that is added to the seed on the device, so that a
    graph draws other rows at each replay.
    """
    M, K = x.shape
    out = torch.empty(m, K, dtype=x.dtype, device=x.device)
    tile, stride = configs.COPY, x.stride(0)
    # Not kept for the next call, which comes with another seed.
    launch_copy = Launch(
        copy_rows, x.device, (launch.cdiv(m, tile.BM), launch.cdiv(K, tile.BK), 1),
        (x.dtype, seed_offset is None, M >> 31, K, stride, x.data_ptr() % 16 == 0),
        [M, m, K, stride, seed_word(seed)], tile.meta(),
    )  # fmt: skip
    launch_copy(x, out, seed_offset)
    return out


def gate_probe(dy: Tensor, x: Tensor, operands: LoRAOperands, seed: int, seed_offset: Tensor | None) -> Tensor:
    """Return `dgate [blocks]` in fp32: 0 for active blocks, the formula above for inactive ones.

    Args:
        dy: `[M, N]`, rows of 16 aligned bytes (`launch.aligned`).
        x: `[m, K]` likewise, the sampled rows: with m = M all of them, else those that `sample_rows` copied.
        operands: A, B contiguous in the dtype of dy, gates in fp32; the scaling with the factor M / m that makes the
            estimate unbiased.
        seed, seed_offset: those of `sample_rows`.
    """
    (M, m), (blocks, r, K), n = (dy.shape[0], x.shape[0]), operands.lora_A.shape, operands.n
    if m == 0:
        return torch.zeros(blocks, device=dy.device)
    R = min(WIDEST, configs.padded(r))
    tile = configs.probe(m)
    row_tiles = launch.cdiv(m, tile.BM)
    out = torch.empty(blocks, row_tiles, dtype=torch.float32, device=dy.device)
    strides = dy.stride(0), x.stride(0)
    launch_probe = Launch(
        probe, dy.device, (blocks * row_tiles, 1, 1),
        (dy.dtype, seed_offset is None, M >> 31, K, n, r, strides, tile),
        [M, m, K, n, r, *strides, seed_word(seed), row_tiles], {"R": R, **tile.meta()},
    )  # fmt: skip
    launch_probe(
        dy, x, operands.lora_A, operands.lora_B, operands.gate, out, seed_offset, operands.threshold, operands.scaling
    )
    return out.sum(1)
