"""Packed block indices: which columns of S and T belong to which block, found on the device from the gates.

S and T hold `packed * r` columns. Where the host knows the active blocks, those are side by side in rising order. Where
it does not (`packed == blocks`), every block has its own columns, active or not. Nothing is uploaded: a program reads
the gates, at most 64 numbers.

Gates that moved since the host counted them reach nothing out of bounds: an active block for which no columns are left
counts as inactive, and so do columns that no block takes.
"""

import triton
import triton.language as tl

MAX_BLOCKS = 64
_MAX_BLOCKS = tl.constexpr(MAX_BLOCKS)


@triton.jit
def in_order(gate, threshold, blocks, packed):
    """Return `(order, count)`: the place of each block when the `count` active ones come first, [64], both rising."""
    i = tl.arange(0, _MAX_BLOCKS)
    on = (tl.load(gate + i, mask=i < blocks, other=float("-inf")) >= threshold) & (i < blocks)
    index = tl.cumsum(on.to(tl.int32), 0) - 1
    on &= index < packed
    count = tl.sum(on.to(tl.int32), 0)
    return tl.where(on, index, count + tl.cumsum(1 - on.to(tl.int32), 0) - 1), count


@triton.jit
def at_place(order, place):
    """Return the block at `place` of `order`."""
    return tl.sum(tl.where(order == place, tl.arange(0, _MAX_BLOCKS), 0), 0)


@triton.jit
def block_of(index, gate, threshold, blocks, packed):
    """Return `(block, active)` of the packed `index`, scalars; `gate [blocks]` fp32."""
    block = index
    active = index >= 0
    if packed == blocks:
        active = tl.load(gate + index) >= threshold
    else:
        order, count = in_order(gate, threshold, blocks, packed)
        block = at_place(order, index)
        active = index < count
    return block, active


@triton.jit
def index_of(block, gate, threshold, blocks, packed):
    """Return `(index, active)` of `block`, scalars; the index means nothing where the block is inactive."""
    order, count = in_order(gate, threshold, blocks, packed)
    place = tl.sum(tl.where(tl.arange(0, _MAX_BLOCKS) == block, order, 0), 0)
    return tl.where(packed == blocks, block, place), place < count
