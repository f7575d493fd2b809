"""Which block a slot of S and T belongs to, found on the device from the gates.

S and T hold `slots * r` columns. Where the host knows the active blocks, there is a slot for each of them, in rising
order. Where it does not (`slots == blocks`), every block has its own, active or not. Nothing is uploaded: a program
reads the gates, at most 64 numbers.
"""

import triton
import triton.language as tl

MAX_BLOCKS = 64
_MAX_BLOCKS = tl.constexpr(MAX_BLOCKS)


@triton.jit
def block_of(slot, gate, threshold, blocks, slots):
    """Return `(block, active)` of `slot`, scalars; `gate [blocks]` fp32."""
    block = slot
    active = slot >= 0
    if slots == blocks:
        active = tl.load(gate + slot) >= threshold
    else:
        i = tl.arange(0, _MAX_BLOCKS)
        on = (tl.load(gate + i, mask=i < blocks, other=float("-inf")) >= threshold) & (i < blocks)
        place = tl.cumsum(on.to(tl.int32), 0) - 1
        block = tl.sum(tl.where(on & (place == slot), i, 0), 0)
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
    return slot, active
