"""The forward of an adapted linear layer in one kernel: base product, S and the low-rank update in one pass.

    S_i = (x . mask) A_i^T                                       [M, r]
    y   = x W^T + bias;   y[:, block i] += S_i (c B_i)^T         for the active blocks

A program computes one tile of y after the other. Each tile belongs to one block. In one loop over K the tile of x on
chip is multiplied with a tile of W into `acc [BM, BN]` and with one of A_i into `s [BM, R]`, both fp32. Then s is
rounded to the dtype of x, which is what the backward will read, `s (c B_i)^T` is added to acc, and acc is rounded once.
The program that has the first tile of columns of a block stores s; S is never read here.

Read: x once per group of row tiles, W once per program wave from L2; A and B, a few columns wide, from L2.
Written: y and S once. Beyond a frozen layer that is `2 M r` bytes, and no launch where A has the dtype of x; fp32 A is
cast by a small launch of its own per call.

Tiles of active blocks come first, then those of inactive ones, in a second loop that neither loads nor multiplies
anything of LoRA; which is which is read from the gates on the device, so that one CUDA graph serves while they move.
Each of the two loops is one pipeline over all its tiles (`flatten`): the loads of the next tile run during the
epilogue of this one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slora.dropout import drop_units, rescaling
from slora.kernels import configs, launch, tiles
from slora.kernels import dropout as counter
from slora.kernels import slots as activity


@triton.jit
def _low_rank_update(
    acc, s, S, B, row, column, slot, M, stop, r, slots, scaling,
    GIVEN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Return `acc + s (c B[column:column + BN])^T`; where GIVEN, s is read from S, R columns at a time."""
    dtype: tl.constexpr = S.dtype.element_ty
    low = s.to(dtype)
    for start in tl.range(0, r if GIVEN else 1, R, num_stages=1):
        if GIVEN:
            low = tiles.load_low(S + slot * r, row, start, M, r, slots * r, BM, R)
        b = tiles.load_low(B, column, start, stop, r, r, BN, R)
        acc = tl.dot(low, (b.to(tl.float32) * scaling).to(dtype).T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _finish(
    acc, bias, y, dtype: tl.constexpr, row, block, column, M, n, N,
    BM: tl.constexpr, BN: tl.constexpr, HALVES: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Add the bias, round and store."""
    if bias is not None:
        columns = column + tl.arange(0, BN)
        acc += tl.load(bias + block * n + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    tiles.store(y, acc.to(dtype), row, block, column, M, n, N, BM, BN, HALVES, DESCRIBED)


@triton.jit(do_not_specialize=["drop", "M", "blocks", "slots"])
def linear_forward(
    x, W, bias, A, B, S, y, gate, seed, threshold, scaling, drop,
    M, N, K, n, r, blocks, slots, stride_x, stride_w,
    GIVEN: tl.constexpr, DROPOUT: tl.constexpr, ONE_BLOCK: tl.constexpr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, UNIT: tl.constexpr,
    GROUP: tl.constexpr, HALVES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """See the head of this file. x [M, K], W [N, K], A [blocks r, K] and y [M, blocks, n]: descriptors or pointers."""
    tl.assume(K > 0)
    r = r // UNIT * UNIT
    dtype: tl.constexpr = S.dtype.element_ty
    if ONE_BLOCK:
        order, count = 0, ((tl.load(gate) >= threshold) & (slots > 0)).to(tl.int32)
    else:
        order, count = activity.in_order(gate, threshold, blocks, slots)
    row_tiles, per_block = tl.cdiv(M, BM), tl.cdiv(n, BN)
    low = tl.arange(0, R)
    if DROPOUT:
        key0, key1, key2 = counter.keys(tl.load(seed))

    with_update = row_tiles * per_block * count
    for tile in tl.range(tl.program_id(0), with_update, tl.num_programs(0), flatten=FLATTEN and not GIVEN):
        m, j = tiles.grouped(tile, row_tiles, per_block * count, GROUP)
        place = j // per_block
        block = 0 if ONE_BLOCK else activity.at_place(order, place)
        row, column, stop = m * BM, block * n + j % per_block * BN, block * n + n
        slot = block if slots == blocks else place
        rows = row + tl.arange(0, BM)
        if DROPOUT:
            a_key, b_key = counter.row_keys(key0, key1, rows)
        acc = tl.zeros((BM, BN), tl.float32)
        s = tl.zeros((BM, R), tl.float32)
        for k in range(0, K, BK):
            x_tile = tiles.load(x, row, k, M, K, stride_x, BM, BK, DESCRIBED)
            w_tile = tiles.load(W, column, k, N, K, stride_w, BN, BK, DESCRIBED)
            acc = tl.dot(x_tile, w_tile.T, acc, input_precision=PRECISION)
            if not GIVEN:
                # Rows of the next block may come along; the columns that they make of s are dropped below.
                a_tile = tiles.load(A, block * r, k, blocks * r, K, K, R, BK, DESCRIBED)
                if DROPOUT:
                    x_tile = tl.where(counter.keep(a_key, b_key, key2, k, drop, BK), x_tile, 0.0)
                s = tl.dot(x_tile, a_tile.T, s, input_precision=PRECISION)
        if not GIVEN:
            s = tl.where((low < r)[None, :], s, 0.0)
            if j % per_block == 0:
                tiles.store_low(S + slot * r, s.to(dtype), row, M, r, slots * r, BM, R)
        acc = _low_rank_update(acc, s, S, B, row, column, slot, M, stop, r, slots, scaling, GIVEN, PRECISION, BM, BN, R)
        _finish(acc, bias, y, dtype, row, block, column - block * n, M, n, N, BM, BN, HALVES, DESCRIBED)

    # The program whose turn it is goes on.
    turns = tl.cdiv(max(with_update - tl.program_id(0), 0), tl.num_programs(0))
    for tile in tl.range(
        tl.program_id(0) + turns * tl.num_programs(0), row_tiles * per_block * blocks, tl.num_programs(0),
        flatten=FLATTEN and not GIVEN,
    ):  # fmt: skip
        m, j = tiles.grouped(tile - with_update, row_tiles, per_block * (blocks - count), GROUP)
        block = 0 if ONE_BLOCK else activity.at_place(order, count + j // per_block)
        row, column, stop = m * BM, block * n + j % per_block * BN, block * n + n
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            x_tile = tiles.load(x, row, k, M, K, stride_x, BM, BK, DESCRIBED)
            w_tile = tiles.load(W, column, k, N, K, stride_w, BN, BK, DESCRIBED)
            acc = tl.dot(x_tile, w_tile.T, acc, input_precision=PRECISION)
        if not GIVEN and slots == blocks and j % per_block == 0:
            zero = tl.zeros((BM, R), dtype)
            tiles.store_low(S + block * r, zero, row, M, r, slots * r, BM, R)
        _finish(acc, bias, y, dtype, row, block, column - block * n, M, n, N, BM, BN, HALVES, DESCRIBED)


def plan(x: Tensor, W: Tensor, A: Tensor, given: bool, dropout: bool) -> configs.Choice:
    """Return how `forward` reads these operands, and its candidates for `config`."""
    blocks, r, K = A.shape
    n = W.shape[0] // blocks
    aligned = given or (K * x.element_size() % 16 == 0 and (A.dtype != x.dtype or A.data_ptr() % 16 == 0))
    access, precision = launch.access(x, W, multiple=n, others=aligned)
    return configs.gemm("forward", launch.part(x.device), access, precision, r, n, given, dropout)


def forward(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    threshold: float,
    scaling: float,
    slots: int,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    S: Tensor | None = None,
    config: configs.Gemm | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(y [M, N], S [M, slots * r])`.

    Args:
        x: `[M, K]` with unit column stride; bf16, fp16 or fp32.
        W: `[N, K]` with unit column stride, in the dtype of x.
        bias: `[N]` in the dtype of x, contiguous, or None.
        A: `[blocks, r, K]` contiguous, in the dtype of x or fp32 (then cast here: 2 r K bytes per block).
        B: `[blocks, N / blocks, r]` contiguous, in the dtype of A; read by the epilogue, which casts and scales it.
        gate: `[blocks]` fp32, at most 64 blocks. Block i is active while `gate[i] >= threshold`.
        scaling: the factor c.
        slots: blocks of columns of S: `blocks`, where those of inactive blocks are written as zeros, or the number of
            active blocks if the host knows it.
        dropout, seed: probability of dropping an element of x on the LoRA path, and the int64 scalar on the device of
            x that the mask is drawn from.
        S: the products of an earlier pass over x, `[M, slots * r]` contiguous in the dtype of x. They are then read
            once per tile of y instead of computed, and returned as they are. A rank above 64 needs this form.
        config: tile sizes; by default the first candidate of `plan`.

    S holds products of the masked x that are not divided by `1 - dropout`.
    """
    M, K = x.shape
    N = W.shape[0]
    blocks, r, _ = A.shape
    n = N // blocks
    given = S is not None
    y = x.new_empty(M, N)
    if S is None:
        S = x.new_empty(M, slots * r)
    if M == 0:
        return y, S
    low = None if given else A.to(x.dtype).view(blocks * r, K)
    choice = plan(x, W, A, given, dropout > 0.0)
    tile = config or choice.candidates[0]
    bulk = choice.access == "bulk"
    tiles_of_y = triton.cdiv(M, tile.BM) * triton.cdiv(n, tile.BN) * blocks
    with launch.on(x.device):
        linear_forward[(min(tiles_of_y, tile.programs * launch.multiprocessors(x.device)),)](
            launch.descriptor(x, [tile.BM, tile.BK]) if bulk else x,
            launch.descriptor(W, [tile.BN, tile.BK]) if bulk else W,
            bias,
            launch.descriptor(low, [choice.R, tile.BK]) if bulk and low is not None else low,
            B, S,
            launch.descriptor(y.view(M, blocks, n), [tile.BM, 1, tile.store_width]) if bulk else y,
            gate, seed, threshold, scaling * rescaling(dropout), drop_units(dropout),
            M, N, K, n, r, blocks, slots, x.stride(0), W.stride(0),
            GIVEN=given, DROPOUT=dropout > 0.0 and not given, ONE_BLOCK=blocks == 1 and choice.one_block,
            DESCRIBED=bulk, PRECISION=choice.dot, R=choice.R, UNIT=choice.unit, **tile.meta(),
        )  # fmt: skip
    return y, S
