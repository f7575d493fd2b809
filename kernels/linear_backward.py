"""The gradient of an adapted linear layer's input in one kernel: base product, T and the low-rank update in one pass.

    T_i = dy[:, block i] B_i                                     [M, r]
    dx  = dy W + sum_i (T_i (c A_i)) . mask                      over the active blocks

A program computes one tile of dx after the other. In one loop over N the tile of dy on chip is multiplied with a tile
of W into `acc [BM, BN]` and with one of B_i into `t [BM, R]`, both fp32. Where a block ends, t is rounded to the dtype
of dy, which is what the gradient of A will read, and `t (c A_i)` is added to acc, which is rounded once, at the end.
The programs that have the first tile of columns store T; it is never read here.

Read: dy once per group of row tiles, W once per program wave from L2; A and B, a few columns wide, from L2.
Written: dx and T once. Beyond a frozen layer that is `2 M r` bytes, and no launch where B has the dtype of dy and rows
that the copy engine can read: fp32 B is cast by a small launch of its own per call, and rows that are no multiple of
16 bytes long are padded by another.

The loop runs over the active blocks first, then in a second loop over the inactive ones, for which nothing of LoRA is
loaded or multiplied; which is which is read from the gates on the device. A layer of one block has one loop over all
its tiles instead, one pipeline: the loads of the next tile run during the epilogue of this one (`flatten`). With
several blocks the pipeline ends with the tile, after the steps of all blocks.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from slora.dropout import drop_units, rescaling
from slora.kernels import configs, launch, tiles
from slora.kernels import dropout as counter
from slora.kernels import slots as activity


@triton.jit
def _low_rank_update(
    acc, t, T, A, keys, row, column, block, slot, M, K, r, slots, scaling, drop,
    GIVEN: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Return `acc + (t (c A_i)[:, column:column + BN]) . mask`; where GIVEN, t is read from T, R columns at a time.

    Else t is stored by the program that has the first tile of columns.
    """
    dtype: tl.constexpr = T.dtype.element_ty
    if not GIVEN and column == 0:
        tiles.store_low(T + slot * r, t.to(dtype), row, M, r, slots * r, BM, R)
    A += tl.cast(block, tl.int64) * r * K
    low = t.to(dtype)
    for start in tl.range(0, r if GIVEN else 1, R, num_stages=1):
        if GIVEN:
            low = tiles.load_low(T + slot * r, row, start, M, r, slots * r, BM, R)
        a = tiles.load_low(A, start, column, r, K, K, R, BN)
        a = (a.to(tl.float32) * scaling).to(dtype)
        if DROPOUT:
            update = tl.dot(low, a, input_precision=PRECISION)
            a_key, b_key = counter.row_keys(keys[0], keys[1], row + tl.arange(0, BM))
            acc += tl.where(counter.keep(a_key, b_key, keys[2], column, drop, BN), update, 0.0)
        else:
            acc = tl.dot(low, a, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _one_block(
    dy, W, A, B, T, dx, keys, scaling, drop, M, K, n, r, slots, stride_dy, stride_w,
    UPDATE: tl.constexpr, DROPOUT: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
    GROUP: tl.constexpr, HALVES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """All tiles of this program, for a layer of one block that is active (UPDATE) or not."""
    dtype: tl.constexpr = T.dtype.element_ty
    row_tiles, column_tiles = tl.cdiv(M, BM), tl.cdiv(K, BN)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        m, j = tiles.grouped(tile, row_tiles, column_tiles, GROUP)
        row, column = m * BM, j * BN
        acc = tl.zeros((BM, BN), tl.float32)
        t = tl.zeros((BM, R), tl.float32)
        for k in range(0, n, BK):
            dy_tile = tiles.load(dy, row, k, M, n, stride_dy, BM, BK, DESCRIBED)
            w_tile = tiles.load(W, k, column, n, K, stride_w, BK, BN, DESCRIBED)
            acc = tl.dot(dy_tile, w_tile, acc, input_precision=PRECISION)
            if UPDATE:
                b_tile = tiles.load(B, k, 0, n, r, r, BK, R, DESCRIBED)
                t = tl.dot(dy_tile, b_tile, t, input_precision=PRECISION)
        if UPDATE:
            acc = _low_rank_update(
                acc, t, T, A, keys, row, column, 0, 0, M, K, r, 1, scaling, drop, False, DROPOUT, PRECISION, BM, BN, R
            )
        elif slots > 0 and column == 0:
            tiles.store_low(T, t.to(dtype), row, M, r, r, BM, R)
        tiles.store(dx, acc.to(dtype), row, 0, column, M, K, K, BM, BN, HALVES, DESCRIBED)


@triton.jit
def _blocks(
    dy, W, A, B, T, dx, on, off, count, keys, scaling, drop, M, K, n, r, blocks, slots, stride_dy, stride_w,
    DROPOUT: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """All tiles of this program, for a layer of several blocks: `count` active ones, the bits of `on`, and `off`."""
    dtype: tl.constexpr = T.dtype.element_ty
    row_tiles, column_tiles, steps = tl.cdiv(M, BM), tl.cdiv(K, BN), tl.cdiv(n, BK)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        m, j = tiles.grouped(tile, row_tiles, column_tiles, GROUP)
        row, column = m * BM, j * BN
        acc = tl.zeros((BM, BN), tl.float32)
        t = tl.zeros((BM, R), tl.float32)
        block, place, k = activity.first_from(on, 0), 0, 0
        for _ in range(count * steps):
            first, stop = block * n, block * n + n
            dy_tile = tiles.load(dy, row, first + k, M, stop, stride_dy, BM, BK, DESCRIBED)
            w_tile = tiles.load(W, first + k, column, stop, K, stride_w, BK, BN, DESCRIBED)
            acc = tl.dot(dy_tile, w_tile, acc, input_precision=PRECISION)
            b_tile = tiles.load(B, first + k, 0, stop, r, r, BK, R, DESCRIBED)
            t = tl.dot(dy_tile, b_tile, t, input_precision=PRECISION)
            k += BK
            if k >= n:
                # It is 0 there already; without this line ptxas 12.9 makes every wgmma of the loop wait for the last.
                t = tl.where((tl.arange(0, R) < r)[None, :], t, 0.0)
                acc = _low_rank_update(
                    acc, t, T, A, keys, row, column, block, block if slots == blocks else place,
                    M, K, r, slots, scaling, drop, False, DROPOUT, PRECISION, BM, BN, R,
                )  # fmt: skip
                t = tl.zeros((BM, R), tl.float32)
            # Apart from the branch above, so that the next loads wait for nothing in it.
            block = tl.where(k >= n, activity.first_from(on, block + 1), block)
            place += (k >= n).to(tl.int32)
            k = tl.where(k >= n, 0, k)
        block, k = activity.first_from(off, 0), 0
        for _ in range((blocks - count) * steps):
            first, stop = block * n, block * n + n
            dy_tile = tiles.load(dy, row, first + k, M, stop, stride_dy, BM, BK, DESCRIBED)
            w_tile = tiles.load(W, first + k, column, stop, K, stride_w, BK, BN, DESCRIBED)
            acc = tl.dot(dy_tile, w_tile, acc, input_precision=PRECISION)
            k += BK
            block = tl.where(k >= n, activity.first_from(off, block + 1), block)
            k = tl.where(k >= n, 0, k)
        if slots == blocks and column == 0:
            block = activity.first_from(off, 0)
            for _ in range(blocks - count):
                tiles.store_low(T + block * r, tl.zeros((BM, R), dtype), row, M, r, slots * r, BM, R)
                block = activity.first_from(off, block + 1)
        tiles.store(dx, acc.to(dtype), row, 0, column, M, K, K, BM, BN, HALVES, DESCRIBED)


@triton.jit
def _given(
    dy, W, A, T, dx, on, count, keys, scaling, drop, M, N, K, r, blocks, slots, stride_dy, stride_w,
    DROPOUT: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """All tiles of this program where T is read: the base product, then the updates of the `count` blocks `on`."""
    row_tiles, column_tiles = tl.cdiv(M, BM), tl.cdiv(K, BN)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        m, j = tiles.grouped(tile, row_tiles, column_tiles, GROUP)
        row, column = m * BM, j * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, N, BK):
            dy_tile = tiles.load(dy, row, k, M, N, stride_dy, BM, BK, DESCRIBED)
            w_tile = tiles.load(W, k, column, N, K, stride_w, BK, BN, DESCRIBED)
            acc = tl.dot(dy_tile, w_tile, acc, input_precision=PRECISION)
        block = activity.first_from(on, 0)
        for place in tl.range(count, num_stages=1):
            acc = _low_rank_update(
                acc, tl.zeros((BM, R), tl.float32), T, A, keys, row, column, block, block if slots == blocks else place,
                M, K, r, slots, scaling, drop, True, DROPOUT, PRECISION, BM, BN, R,
            )  # fmt: skip
            block = activity.first_from(on, block + 1)
        tiles.store(dx, acc.to(T.dtype.element_ty), row, 0, column, M, K, K, BM, BN, HALVES, DESCRIBED)


@triton.jit(do_not_specialize=["drop", "M", "blocks", "slots"])
def linear_backward(
    dy, W, A, B, T, dx, gate, seed, threshold, scaling, drop,
    M, N, K, n, r, blocks, slots, stride_dy, stride_w,
    GIVEN: tl.constexpr, DROPOUT: tl.constexpr, ONE_BLOCK: tl.constexpr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, UNIT: tl.constexpr,
    GROUP: tl.constexpr, HALVES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """See the head of this file. dy [M, N], W [N, K], B [N, r] and dx [M, 1, K] are descriptors or pointers."""
    tl.assume(n > 0)
    r = r // UNIT * UNIT
    if DESCRIBED:
        # Rows of W start at multiples of 16 bytes.
        K = K // 4 * 4
    keys = (0, 0, 0)
    if DROPOUT:
        keys = counter.keys(tl.load(seed))
    if GIVEN or not ONE_BLOCK:
        on, off, count = activity.as_bits(gate, threshold, blocks, slots)
    if GIVEN:
        _given(
            dy, W, A, T, dx, on, count, keys, scaling, drop, M, N, K, r, blocks, slots, stride_dy, stride_w,
            DROPOUT, DESCRIBED, PRECISION, BM, BN, BK, R, GROUP, HALVES,
        )  # fmt: skip
    elif not ONE_BLOCK:
        _blocks(
            dy, W, A, B, T, dx, on, off, count, keys, scaling, drop, M, K, n, r, blocks, slots, stride_dy, stride_w,
            DROPOUT, DESCRIBED, PRECISION, BM, BN, BK, R, GROUP, HALVES,
        )  # fmt: skip
    elif (tl.load(gate) >= threshold) & (slots > 0):
        _one_block(
            dy, W, A, B, T, dx, keys, scaling, drop, M, K, n, r, slots, stride_dy, stride_w,
            True, DROPOUT, DESCRIBED, PRECISION, BM, BN, BK, R, GROUP, HALVES, FLATTEN,
        )  # fmt: skip
    else:
        _one_block(
            dy, W, A, B, T, dx, keys, scaling, drop, M, K, n, r, slots, stride_dy, stride_w,
            False, DROPOUT, DESCRIBED, PRECISION, BM, BN, BK, R, GROUP, HALVES, FLATTEN,
        )  # fmt: skip


def plan(dy: Tensor, W: Tensor, A: Tensor, given: bool, dropout: bool) -> configs.Choice:
    """Return how `input_gradient` reads these operands, and its candidates for `config`."""
    blocks, r, K = A.shape
    n = W.shape[0] // blocks
    ends = n * blocks if given else n
    part = launch.part(dy.device)
    even = K * dy.element_size() % 16 == 0
    choice = configs.gemm("backward", part, *launch.access(dy, W, multiple=ends, others=even), r, K, given, dropout)
    # A tile that the copy engine brings must not reach over the end of a block.
    fit = tuple(tile for tile in choice.candidates if given or blocks == 1 or n % tile.BK == 0)
    if fit or choice.access != "bulk":
        return choice._replace(candidates=fit or choice.candidates)
    access, precision = launch.access(dy, W, multiple=ends, others=False)
    return configs.gemm("backward", part, access, precision, r, K, given, dropout)


def input_gradient(
    dy: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    threshold: float,
    scaling: float,
    slots: int,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    T: Tensor | None = None,
    config: configs.Gemm | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(dx [M, K], T [M, slots * r])`.

    Args:
        dy: `[M, N]` with unit column stride; bf16, fp16 or fp32.
        W: `[N, K]` with unit column stride, in the dtype of dy.
        A: `[blocks, r, K]` contiguous, in the dtype of dy or fp32; read by the epilogue, which casts and scales it.
        B: `[blocks, N / blocks, r]` contiguous, in the dtype of A. Cast here where that differs from that of dy, and
            padded to a multiple of 16 bytes per row for the copy engine: 2 N r bytes each.
        gate: `[blocks]` fp32, at most 64 blocks. Block i is active while `gate[i] >= threshold`.
        scaling: the factor c.
        slots: blocks of columns of T: `blocks`, where those of inactive blocks are written as zeros, or the number of
            active blocks if the host knows it.
        dropout, seed: those of the forward; the mask is drawn anew.
        T: the products of an earlier pass over dy, `[M, slots * r]` contiguous in the dtype of dy. They are then read
            once per tile of dx instead of computed, and returned as they are. A rank above 64 needs this form.
        config: tile sizes, one of the candidates of `plan`; by default the first. Where the copy engine brings tiles of
            several blocks, its steps divide a block.
    """
    M, N = dy.shape
    blocks, r, K = A.shape
    n = N // blocks
    given = T is not None
    dx = dy.new_empty(M, K)
    if T is None:
        T = dy.new_empty(M, slots * r)
    if M == 0:
        return dx, T
    choice = plan(dy, W, A, given, dropout > 0.0)
    tile = config or choice.candidates[0]
    bulk = choice.access == "bulk"
    low = None
    if not given:
        low = B.to(dy.dtype).view(N, r)
        if bulk and not launch.describable(low):
            low = F.pad(low, (0, -r % (16 // low.element_size())))
    tiles_of_dx = triton.cdiv(M, tile.BM) * triton.cdiv(K, tile.BN)
    with launch.on(dy.device):
        linear_backward[(min(tiles_of_dx, tile.programs * launch.multiprocessors(dy.device)),)](
            launch.descriptor(dy, [tile.BM, tile.BK]) if bulk else dy,
            launch.descriptor(W, [tile.BK, tile.BN]) if bulk else W,
            A,
            launch.descriptor(low, [tile.BK, choice.R]) if bulk and low is not None else low,
            T,
            launch.descriptor(dx.view(M, 1, K), [tile.BM, 1, tile.store_width]) if bulk else dx,
            gate, seed, threshold, scaling * rescaling(dropout), drop_units(dropout),
            M, N, K, n, r, blocks, slots, dy.stride(0), W.stride(0),
            GIVEN=given, DROPOUT=dropout > 0.0, ONE_BLOCK=blocks == 1 and choice.one_block,
            DESCRIBED=bulk, PRECISION=choice.dot, R=choice.R, UNIT=choice.unit, **tile.meta(),
        )  # fmt: skip
    return dx, T
