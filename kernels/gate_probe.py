"""The straight-through gradient of inactive gates from a sample of rows, several layers in one launch.

    dgate_i = c * sum over the sampled rows of <x A_i^T, dy[:, block i] B_i>          for each inactive block i

`slora.probe.sampled_rows` draws the rows: one from each of m equal strata of the M rows, by a hash of (seed, stratum).
Here the same hash is drawn inside the kernels, so that no list of rows exists in memory: `sample_rows` copies the rows
of x in the forward (only they are kept until the backward), and `gate_probe` finds the same rows of dy in place.

A program owns a few sampled rows and a block, computes S and T of both in fp32 and leaves one number; the numbers of a
block are added in a fixed order. There are no atomics. Nothing of an active block is read.

The library itself probes a layer at a time (`slora.probe` says why); several are for callers outside of autograd, and
not for CUDA graphs, because the table of layers comes from the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slora.kernels import dropout as counter
from slora.kernels import launch, narrow_configs

# The widest group of columns of S and T that a program holds; larger ranks take several turns.
WIDEST = 64


class Layer(NamedTuple):
    """One layer of a launch. Shapes: `dy [M, N]`, `x [m, K]`, `lora_A [blocks, r, K]`, `lora_B [blocks, n, r]`."""

    dy: Tensor
    x: Tensor
    """The sampled rows of x: with m = M all of them, else those that `sample_rows` copied with the same seed."""
    lora_A: Tensor
    lora_B: Tensor
    gate: Tensor
    """fp32. Block i is probed while `gate[i] < threshold`."""
    threshold: float
    scaling: float
    """c, times the factor M / m that makes the estimate unbiased."""
    seed: int
    shift: Tensor | None = None
    """An int64 scalar that is added to the seed on the device, so that a graph draws other rows at each replay."""


def seed_word(seed: int) -> int:
    """Return what the hash adds to the number of a stratum, modulo 2**32.

    It is a signed number of 32 bits, because Triton compiles anew for an argument that needs 64.
    """
    return (seed * 0x9E3779B1 + 0x80000000 & 0xFFFFFFFF) - 0x80000000


def check_rows(M: int, m: int) -> None:
    """Raise where `sampled_row` would overflow.

    Raises:
        ValueError: `m * M` is 2**39 or more.
    """
    if m < M and m * M >= 2**39:
        raise ValueError(f"m={m} of M={M} rows cannot be drawn in 64 bits; m * M must be below 2**39, so take fewer")


@triton.jit
def shifted(word, shift):
    """Return what `seed_word` gives for a seed that is larger by the number at `shift`, up to multiples of 2**32."""
    return word if shift is None else word + tl.load(shift) * 0x9E3779B1


@triton.jit
def sampled_row(k, M, m, word):
    """Return the row drawn from stratum `k [...]`, int64, of M and m that passed `check_rows`; `word` is
    `seed_word(seed)` up to multiples of 2**32."""
    u = (counter.mix((k.to(tl.int64) + word).to(tl.uint32)) >> 8).to(tl.int64)
    return (((k.to(tl.int64) << 24) + u) * M // m) >> 24


@triton.jit(do_not_specialize=["M", "m", "word"])
def _sample_rows(x, out, shift, M, m, K, stride_x, word, BM: tl.constexpr, BK: tl.constexpr):
    k = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (k < m)[:, None] & (columns < K)[None, :]
    row = tl.where(k < m, sampled_row(k, M, m, shifted(word, shift)), 0)
    tile = tl.load(x + row[:, None] * stride_x + columns[None, :], mask=inside)
    tl.store(out + k[:, None].to(tl.int64) * K + columns[None, :], tile, mask=inside)


@triton.jit
def _product(
    dy, x, A, B, k, M, m, K, n, r, block, stride_dy, stride_x, word,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Return `<x A_i^T, dy[:, block i] B_i>` over the sampled rows `k [BM]`, a scalar."""
    inside = k < m
    row = k.to(tl.int64)
    if m < M:
        row = tl.where(inside, sampled_row(k, M, m, word), 0)
    x += k[:, None].to(tl.int64) * stride_x
    dy += row[:, None] * stride_dy + block.to(tl.int64) * n
    total = 0.0
    for group in range(0, r, LOW):
        j = group + tl.arange(0, LOW)
        S = tl.zeros((BM, LOW), tl.float32)
        for first in range(0, K, BK):
            c = first + tl.arange(0, BK)
            tile = tl.load(x + c[None, :], mask=inside[:, None] & (c < K)[None, :], other=0.0)
            at = (block.to(tl.int64) * r + j)[None, :] * K + c[:, None]
            low = tl.load(A + at, mask=(j < r)[None, :] & (c < K)[:, None], other=0.0)
            S = tl.dot(tile, low.to(tile.dtype), S, input_precision=PRECISION)
        T = tl.zeros((BM, LOW), tl.float32)
        for first in range(0, n, BK):
            c = first + tl.arange(0, BK)
            tile = tl.load(dy + c[None, :], mask=inside[:, None] & (c < n)[None, :], other=0.0)
            at = (block.to(tl.int64) * n + c)[:, None] * r + j[None, :]
            low = tl.load(B + at, mask=(j < r)[None, :] & (c < n)[:, None], other=0.0)
            T = tl.dot(tile, low.to(tile.dtype), T, input_precision=PRECISION)
        total += tl.sum(tl.sum(S * T, 1), 0)
    return total


@triton.jit(do_not_specialize=["M", "m", "word", "tiles"])
def _probe(
    dy, x, A, B, gate, out, shift, threshold, scaling, M, m, K, n, r, stride_dy, stride_x, word, tiles,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Program (block, tile of sampled rows) of one layer; a single number, because blocks or tiles may be many."""
    tile = tl.program_id(0) % tiles
    block = tl.program_id(0) // tiles
    result = 0.0
    if tl.load(gate + block) < threshold:
        k = tile * BM + tl.arange(0, BM)
        result = scaling * _product(
            dy, x, A, B, k, M, m, K, n, r, block, stride_dy, stride_x, shifted(word, shift), PRECISION, BM, BK, LOW
        )
    tl.store(out + block * tiles + tile, result)


# Columns of the table of layers: addresses, then sizes.
_FIELDS = tl.constexpr(15)


@triton.jit(do_not_specialize=["layers", "tiles"])
def _probe_table(
    table, factors, out, layers, tiles, LAYERS: tl.constexpr, ROW_DTYPE: tl.constexpr, LORA_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Program (block of any layer, tile of sampled rows): finds its layer by the number of its first block."""
    tile = tl.program_id(0) % tiles
    number = tl.program_id(0) // tiles
    i = tl.arange(0, LAYERS)
    firsts = tl.load(table + i * _FIELDS + 13, mask=i < layers, other=2147483647)
    layer = tl.sum((firsts <= number).to(tl.int32), 0) - 1
    entry = table + layer * _FIELDS
    dy = tl.load(entry).to(tl.pointer_type(ROW_DTYPE))
    x = tl.load(entry + 1).to(tl.pointer_type(ROW_DTYPE))
    A = tl.load(entry + 2).to(tl.pointer_type(LORA_DTYPE))
    B = tl.load(entry + 3).to(tl.pointer_type(LORA_DTYPE))
    gate = tl.load(entry + 4).to(tl.pointer_type(tl.float32))
    M, m = tl.load(entry + 5), tl.load(entry + 6)
    K, n, r = tl.load(entry + 7).to(tl.int32), tl.load(entry + 8).to(tl.int32), tl.load(entry + 9).to(tl.int32)
    stride_dy, stride_x, word = tl.load(entry + 10), tl.load(entry + 11), tl.load(entry + 12)
    block = number - tl.load(entry + 13).to(tl.int32)
    shift = tl.load(entry + 14)
    word += tl.load(shift.to(tl.pointer_type(tl.int64)), mask=shift != 0, other=0) * 0x9E3779B1
    result = 0.0
    if (tl.load(gate + block) < tl.load(factors + 2 * layer)) & (tile * BM < m):
        k = tile * BM + tl.arange(0, BM)
        result = tl.load(factors + 2 * layer + 1) * _product(
            dy, x, A, B, k, M, m, K, n, r, block, stride_dy, stride_x, word, PRECISION, BM, BK, LOW
        )
    tl.store(out + number * tiles + tile, result)


def sample_rows(x: Tensor, m: int, seed: int, shift: Tensor | None = None) -> Tensor:
    """Return the `[m, K]` rows of `x [M, K]` that `slora.probe.sampled_rows(M, m, seed)` names; m below M.

    `shift` is as for `Layer`.
    """
    M, K = x.shape
    check_rows(M, m)
    out = torch.empty(m, K, dtype=x.dtype, device=x.device)
    tile = narrow_configs.SAMPLE
    with launch.on(x.device):
        _sample_rows[(triton.cdiv(m, tile["BM"]), triton.cdiv(K, tile["BK"]))](
            x, out, shift, M, m, K, x.stride(0), seed_word(seed), **tile
        )
    return out


def gate_probe(layers: Sequence[Layer]) -> list[Tensor]:
    """Return `dgate [blocks]` in fp32 of each layer: 0 for active blocks, the formula above for inactive ones.

    One launch for a single layer, without any table; several layers of one device, one dtype of x and dy and one of A
    and B share another, which reads their addresses and sizes from a small table that is uploaded first. Columns of x
    and dy have unit stride, A, B and gate are contiguous.
    """
    if not layers:
        return []
    for layer in layers:
        check_rows(layer.dy.shape[0], layer.x.shape[0])
    first = layers[0]
    device, rows, lora = first.dy.device, first.dy.dtype, first.lora_A.dtype
    LOW = min(WIDEST, triton.next_power_of_2(max(16, *(layer.lora_A.shape[1] for layer in layers))))
    most = max(layer.x.shape[0] for layer in layers)
    total = sum(layer.lora_A.shape[0] for layer in layers)
    if most == 0:
        return [torch.zeros(layer.gate.shape, device=device) for layer in layers]
    aligned = all(launch.in_vectors(t) for t in (first.dy, first.x)) and first.lora_B.shape[1] % 16 == 0
    tile = narrow_configs.gate_probe(launch.kind(rows), most, LOW, len(layers), aligned)
    tiles = triton.cdiv(most, tile.BM)
    out = torch.empty(total, tiles, dtype=torch.float32, device=device)
    meta: dict[str, Any] = {"PRECISION": launch.precision(rows), "LOW": LOW, **tile.meta()}
    with launch.on(device):
        if len(layers) == 1:
            dy, x, A, B, gate, threshold, scaling, seed, shift = first
            _probe[(total * tiles,)](
                dy, x, A, B, gate, out, shift, threshold, scaling, dy.shape[0], x.shape[0], x.shape[1], B.shape[1],
                A.shape[1], dy.stride(0), x.stride(0), seed_word(seed), tiles, **meta,
            )  # fmt: skip
        else:
            table, factors = _table(layers)
            _probe_table[(total * tiles,)](
                table, factors, out, len(layers), tiles, LAYERS=triton.next_power_of_2(len(layers)),
                ROW_DTYPE=_TYPES[rows], LORA_DTYPE=_TYPES[lora], **meta,
            )  # fmt: skip
    return list(torch.split(out.sum(1), [layer.lora_A.shape[0] for layer in layers]))


_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _table(layers: Sequence[Layer]) -> tuple[Tensor, Tensor]:
    """The layers as the kernel reads them: int64 `[layers, 15]`, and fp32 `[layers, 2]` of thresholds and factors."""
    entries, number = [], 0
    for dy, x, A, B, gate, _, _, seed, shift in layers:
        if (dy.device, dy.dtype, A.dtype) != (layers[0].dy.device, layers[0].dy.dtype, layers[0].lora_A.dtype):
            raise ValueError("layers of one launch share a device and the dtypes of x and of lora_A")
        entries.append([
            dy.data_ptr(), x.data_ptr(), A.data_ptr(), B.data_ptr(), gate.data_ptr(),
            dy.shape[0], x.shape[0], x.shape[1], B.shape[1], A.shape[1], dy.stride(0), x.stride(0), seed_word(seed),
            number, 0 if shift is None else shift.data_ptr(),
        ])  # fmt: skip
        number += A.shape[0]
    factors = torch.tensor([[layer.threshold, layer.scaling] for layer in layers], dtype=torch.float32)
    device = layers[0].dy.device
    return torch.tensor(entries, dtype=torch.int64).to(device), factors.to(device)
