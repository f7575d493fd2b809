"""Which block a slot of S and T belongs to, found on the device from the gates.

S and T hold `slots * r` columns. Where the host knows the active blocks, there is a slot for each of them, in rising
order. Where it does not (`slots == blocks`), every block has its own, active or not. Nothing is uploaded: a program
reads the gates, at most 64 numbers.

Gates that moved since the host counted them reach nothing out of bounds: an active block for which no slot is left
counts as inactive, and so does a slot that no block takes.
"""

import triton
import triton.language as tl

MAX_BLOCKS = 64
_MAX_BLOCKS = tl.constexpr(MAX_BLOCKS)


@triton.jit
def _present(gate, threshold, blocks, slots):
    """Return `(i, on, place)`, each [64]: the blocks, whether each is active and has a slot, and its place among
    those."""
    i = tl.arange(0, _MAX_BLOCKS)
    on = (tl.load(gate + i, mask=i < blocks, other=float("-inf")) >= threshold) & (i < blocks)
    place = tl.cumsum(on.to(tl.int32), 0) - 1
    return i, on & (place < slots), place


@triton.jit
def block_of(slot, gate, threshold, blocks, slots):
    """Return `(block, active)` of `slot`, scalars; `gate [blocks]` fp32."""
    block = slot
    active = slot >= 0
    if slots == blocks:
        active = tl.load(gate + slot) >= threshold
    else:
        i, on, place = _present(gate, threshold, blocks, slots)
        here = on & (place == slot)
        block = tl.sum(tl.where(here, i, 0), 0)
        active = tl.max(here.to(tl.int32), 0) > 0
    return block, active


@triton.jit
def blocks_of(slots_wanted, valid, gate, threshold, blocks, slots):
    """Return `(block, active)` of each slot in `slots_wanted [n]`; False where `valid [n]` is."""
    block = slots_wanted
    active = valid
    if slots == blocks:
        active &= tl.load(gate + slots_wanted, mask=valid, other=float("-inf")) >= threshold
    else:
        i, on, place = _present(gate, threshold, blocks, slots)
        here = on[None, :] & (place[None, :] == slots_wanted[:, None])
        block = tl.sum(tl.where(here, i[None, :], 0), 1)
        active &= tl.max(here.to(tl.int32), 1) > 0
    return block, active


@triton.jit
def slot_of(block, gate, threshold, blocks, slots):
    """Return `(slot, active)` of `block`, scalars; `slot` means nothing where the block is inactive."""
    active = tl.load(gate + block) >= threshold
    slot = block
    if slots != blocks:
        i = tl.arange(0, _MAX_BLOCKS)
        on = (tl.load(gate + i, mask=i < blocks, other=float("-inf")) >= threshold) & (i < block)
        slot = tl.sum(on.to(tl.int32), 0)
        active &= slot < slots
    return slot, active


@triton.jit
def in_order(gate, threshold, blocks, slots):
    """Return `(order, count)`: the place of each block when the `count` active ones come first, [64], both rising."""
    _, on, place = _present(gate, threshold, blocks, slots)
    count = tl.sum(on.to(tl.int32), 0)
    return tl.where(on, place, count + tl.cumsum(1 - on.to(tl.int32), 0) - 1), count


@triton.jit
def at_place(order, place):
    """Return the block at `place` of `order`."""
    return tl.sum(tl.where(order == place, tl.arange(0, _MAX_BLOCKS), 0), 0)


@triton.jit
def as_bits(gate, threshold, blocks, slots):
    """Return `(on, off, count)`: the active and the inactive blocks as bits of a uint64, and how many are active."""
    i, on, _ = _present(gate, threshold, blocks, slots)
    bit = i.to(tl.uint64)
    bits = tl.sum(on.to(tl.uint64) << bit, 0)
    return bits, tl.sum((i < blocks).to(tl.uint64) << bit, 0) - bits, tl.sum(on.to(tl.int32), 0)


@triton.jit
def first_from(bits, block):
    """Return the first block from `block` on whose bit is set; what it returns where there is none means nothing."""
    # A shift by all 64 bits, as it follows on the last block, is undefined.
    rest = bits >> tl.minimum(block, _MAX_BLOCKS - 1).to(tl.uint64)
    lowest = rest & (0 - rest)
    # A power of two is exact in fp64, where its logarithm is the exponent: bits 52 to 62, from 1023 up.
    return block + ((lowest.to(tl.float64).to(tl.uint64, bitcast=True) >> 52).to(tl.int32) & 0x7FF) - 1023
