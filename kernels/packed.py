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
def _present(gate, threshold, blocks, packed):
    """Return `(i, on, index)`, each [64]: the blocks, whether each is active and has columns, its index among those."""
    i = tl.arange(0, _MAX_BLOCKS)
    on = (tl.load(gate + i, mask=i < blocks, other=float("-inf")) >= threshold) & (i < blocks)
    index = tl.cumsum(on.to(tl.int32), 0) - 1
    return i, on & (index < packed), index


@triton.jit
def block_of(index, gate, threshold, blocks, packed):
    """Return `(block, active)` of the packed `index`, scalars; `gate [blocks]` fp32."""
    block = index
    active = index >= 0
    if packed == blocks:
        active = tl.load(gate + index) >= threshold
    else:
        i, on, place = _present(gate, threshold, blocks, packed)
        here = on & (place == index)
        block = tl.sum(tl.where(here, i, 0), 0)
        active = tl.max(here.to(tl.int32), 0) > 0
    return block, active


@triton.jit
def index_of(block, gate, threshold, blocks, packed):
    """Return `(index, active)` of `block`, scalars; the index means nothing where the block is inactive."""
    active = tl.load(gate + block) >= threshold
    index = block
    if packed != blocks:
        i, on, _ = _present(gate, threshold, blocks, packed)
        index = tl.sum((on & (i < block)).to(tl.int32), 0)
        active &= index < packed
    return index, active


@triton.jit
def in_order(gate, threshold, blocks, packed):
    """Return `(order, count)`: the place of each block when the `count` active ones come first, [64], both rising."""
    _, on, index = _present(gate, threshold, blocks, packed)
    count = tl.sum(on.to(tl.int32), 0)
    return tl.where(on, index, count + tl.cumsum(1 - on.to(tl.int32), 0) - 1), count


@triton.jit
def at_place(order, place):
    """Return the block at `place` of `order`."""
    return tl.sum(tl.where(order == place, tl.arange(0, _MAX_BLOCKS), 0), 0)


@triton.jit
def as_bits(gate, threshold, blocks, packed):
    """Return the active blocks as bits of a uint64, which a program keeps in a register: see `in_bits`."""
    i, on, _ = _present(gate, threshold, blocks, packed)
    return tl.sum(on.to(tl.uint64) << i.to(tl.uint64), 0)


@triton.jit
def in_bits(bits, block, blocks, packed):
    """Return `(index, active)` of `block` as `index_of` does."""
    one = tl.full((), 1, tl.uint64)
    at = tl.cast(block, tl.uint64)
    # How many bits are set below that of the block, summed in pairs, nibbles and bytes. Without a branch, which would
    # cost the loop that asks its pipeline.
    below = bits & ((one << at) - 1)
    below -= (below >> 1) & 0x5555555555555555
    below = (below & 0x3333333333333333) + ((below >> 2) & 0x3333333333333333)
    index = (((below + (below >> 4) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101) >> 56).to(tl.int32)
    return tl.where(packed == blocks, block, index), ((bits >> at) & 1) != 0
