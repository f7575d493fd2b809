"""LoRA dropout inside a kernel: `slora.ops.dropout`, whose numbers these are, in Triton.

    key0, key1, key2 = keys(tl.load(seed_pointer))                    once per program
    a, b = row_keys(key0, key1, rows)                                 once per tile of rows
    mask = keep(a, b, key2, first_column, drop, BK)                   in the main loop, bool [rows, BK]

`drop` is a run-time integer, `slora.ops.dropout.drop_units(p)`. Nothing is divided by `1 - p` here: the launcher puts
`slora.ops.dropout.rescaling(p)` into the scaling that it passes, so that masking a tile is exact in every dtype.

Two neighbouring columns share a hash. Where a thread holds both, as every load and every tensor-core fragment of
16-bit elements does, the compiler computes it once.
"""

import triton
import triton.language as tl

from slora.ops import dropout

_C0, _C1, _C2 = tl.constexpr(dropout.C0), tl.constexpr(dropout.C1), tl.constexpr(dropout.C2)
_D0, _D1 = tl.constexpr(dropout.D0), tl.constexpr(dropout.D1)


@triton.jit
def mix(z):
    """Wellons' lowbias32 on uint32 `z`, a bijection."""
    z = (z ^ (z >> 16)) * tl.full((), _D0, tl.uint32)
    z = (z ^ (z >> 15)) * tl.full((), _D1, tl.uint32)
    return z ^ (z >> 15)


@triton.jit
def keys(seed):
    """Return the three keys of the int64 scalar `seed`."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    key0 = mix(low + mix(high ^ tl.full((), _C0, tl.uint32)))
    key1 = mix(high + mix(key0 ^ tl.full((), _C1, tl.uint32)))
    key2 = mix(key0 ^ (key1 + tl.full((), _C2, tl.uint32)))
    return key0, key1, key2


@triton.jit
def row_keys(key0, key1, rows):
    """Return the two keys of each of `rows [BM]`."""
    rows = rows.to(tl.uint32)
    return mix(rows ^ key0), mix(rows + key1)


@triton.jit
def keep(a, b, key2, first, drop, BK: tl.constexpr):
    """Return the mask `[BM, BK]` of the rows with keys `a`, `b` and the BK columns from `first`: True where x is kept.

    `first` is even. It is apart from the constant range so that the compiler sees which columns are pairs.
    """
    columns = tl.arange(0, BK)
    c = mix(((first >> 1) + (columns >> 1)).to(tl.uint32) + key2)
    z = a[:, None] ^ c[None, :]
    z = (z ^ (z >> 16)) * tl.full((), _D0, tl.uint32)
    z = (z ^ (z >> 15) ^ b[:, None]) * tl.full((), _D1, tl.uint32)
    odd = ((columns & 1) != 0)[None, :]
    # 16 bits for each of the pair: the upper half of z, and the upper half of z ^ z << 16.
    return tl.where(odd, z ^ (z << 16), z) >= (tl.cast(drop, tl.uint32) << 16)
