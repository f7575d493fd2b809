"""Tile sizes: for every kernel and arch a few candidates, of which a measurement picks one per shape.

`python -m benchmarks.audit` compiles each of them with the widest S and T that it serves; what it found is in
benchmarks/results/audit/kernels.csv. None spills, all fit into shared memory and use the arch's own tensor-core
instructions.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

# Bytes of shared memory that one program may use, by arch. For 80 it is that of compute capability 8.6, 8.9 and 12.0,
# which use the same tiles (8.0 itself has 163 kB).
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ARCHS = tuple(SHARED_MEMORY)
RANKS = (16, 32, 64, 128, 256)
"""Columns of S, T, A and B that kernels compute with; what a rank lacks to the next of them is masked."""
ANY_WIDTH = 512
"""Stands for more packed columns of T than the largest of `RANKS`, which the input gradient adds in a loop."""
MAX_FUSED_RANK = 64
"""Above it the fp32 sums of S or T would not fit beside those of a tile of y or dx."""

Variant = Literal["fused", "precomputed", "masked"]
"""S or T computed in the main loop; read; read, and dx has a mask."""


# Tiles are keys at every launch: compared by identity, they are hashed without reading their fields.
class _Tile:
    def meta(self) -> dict[str, Any]:
        """Return the compile-time arguments and the options of the launch."""
        return {name: value for name, value in vars(self).items() if name != "programs"}


@dataclasses.dataclass(frozen=True, eq=False)
class Gemm(_Tile):
    """Tile sizes of the kernels in `linear`."""

    BM: int
    """Rows of x or dy per tile."""
    BN: int
    """Columns of y or dx per tile."""
    BK: int
    """Steps of the main loop: columns of x or dy."""
    num_warps: int
    num_stages: int
    """Tiles of each operand that are in shared memory or on their way."""
    programs: int = 1
    """How many programs share an SM; the kernels are persistent."""
    HALVES: bool = False
    """Store the two halves of a tile one after the other, through a buffer half as large."""
    FLATTEN: bool = False
    """One pipeline over all tiles of a program instead of one per tile."""
    GROUP: int = 8
    """Row tiles that are worked on side by side; see `tiles.grouped`."""

    @property
    def store_width(self) -> int:
        """Columns of y or dx that leave at once."""
        return self.BN // 2 if self.HALVES else self.BN

    def of_weight(self, forward: bool) -> tuple[int, int]:
        """Return the shape of the tiles of W."""
        return (self.BN, self.BK) if forward else (self.BK, self.BN)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows(_Tile):
    """Tile sizes of `skinny` and `gate_probe`, whose programs own rows and walk along the columns of x or dy."""

    BM: int
    BK: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True, eq=False)
class Columns(_Tile):
    """Tile sizes of `weight_gradients`, whose programs own columns of x or dy and walk along the rows."""

    TILE: int
    """Columns of x or dy that a program owns."""
    ROWS: int
    """Rows per step of its loop."""
    num_warps: int
    num_stages: int


_WIDE = Gemm(128, 256, 64, 8, 3, HALVES=True, FLATTEN=True)
_SQUARE = Gemm(128, 128, 64, 8, 4, FLATTEN=True)
_LOW = Gemm(64, 128, 64, 8, 4, FLATTEN=True)
_DEEP = Gemm(128, 256, 64, 8, 4, HALVES=True, FLATTEN=True)
# Two programs share an SM: the main loop of one runs during the epilogue of the other.
_PAIR = Gemm(128, 128, 32, 4, 4, programs=2, HALVES=True, FLATTEN=True)
# Elsewhere than on sm_90 `FLATTEN` costs registers, or the compiler fails.
_SQUARE_80, _NARROW_80 = Gemm(128, 128, 32, 8, 4), Gemm(128, 64, 32, 8, 4)
_SQUARE_100, _WIDE_100 = Gemm(128, 128, 64, 8, 3), Gemm(128, 256, 64, 8, 3, HALVES=True)

# The best guess first, each with the widest S or T that registers (or tensor memory) and shared memory allow.
GEMMS: dict[tuple[int, Variant], tuple[tuple[Gemm, int], ...]] = {
    (80, "fused"): ((_SQUARE_80, 32), (_NARROW_80, 64)),
    (80, "precomputed"): ((_SQUARE_80, ANY_WIDTH),),
    (80, "masked"): ((_NARROW_80, ANY_WIDTH),),
    (90, "fused"): ((_WIDE, 32), (_PAIR, 32), (_SQUARE, 64), (_LOW, 64)),
    (90, "precomputed"): ((_WIDE, ANY_WIDTH), (_DEEP, ANY_WIDTH), (_PAIR, ANY_WIDTH)),
    (90, "masked"): ((_SQUARE, ANY_WIDTH), (_LOW, ANY_WIDTH)),
    (100, "fused"): ((_SQUARE_100, 64),),
    (100, "precomputed"): ((_WIDE_100, ANY_WIDTH), (_SQUARE_100, ANY_WIDTH)),
    (100, "masked"): ((_SQUARE_100, ANY_WIDTH),),
}
# Likewise for products with so many padded columns of S or T.
WEIGHT_GRADIENTS: dict[int, tuple[tuple[Columns, int], ...]] = {
    80: ((Columns(128, 64, 4, 3), 32), (Columns(128, 32, 8, 3), 128)),
    90: (
        (Columns(128, 64, 4, 3), 32), (Columns(128, 32, 4, 4), 64), (Columns(256, 64, 8, 3), 32),
        (Columns(128, 64, 8, 2), 128),
    ),
    100: ((Columns(128, 64, 4, 3), 32), (Columns(128, 32, 8, 3), 128)),
}  # fmt: skip
# Of `skinny`: few rows, at most 64 columns; many rows; more columns. Of `gate_probe`: a few hundred rows, and many.
SKINNY = ((Rows(16, 64, 4, 3), 64), (Rows(64, 64, 4, 3), 64), (Rows(64, 32, 8, 3), 256))
PROBE = ((Rows(16, 64, 4, 3), 64), (Rows(32, 64, 8, 3), 64))
COPY = Rows(8, 256, 4, 2)


def arch_of(major: int) -> int:
    """Return the arch, 80, 90 or 100, whose tiles a GPU of compute capability `major` uses."""
    return {9: 90, 10: 100}.get(major, 80)


@functools.cache
def padded(r: int) -> int:
    """Return the entry of `RANKS` that holds `r` columns, else `ANY_WIDTH`."""
    return next((R for R in RANKS if r <= R), ANY_WIDTH)


def gemm(arch: int, variant: Variant, R: int) -> tuple[Gemm, ...]:
    """Return the candidates of a variant for S or T of the padded width `R`, the best guess first."""
    return tuple(dict.fromkeys(tile for tile, most in GEMMS[arch, variant] if most >= R))


def weight_gradients(arch: int, low: int) -> tuple[Columns, ...]:
    """Return the candidates for products with `low` padded columns of S or T, at most 128, the best guess first."""
    return tuple(tile for tile, most in WEIGHT_GRADIENTS[arch] if low <= most)


def skinny(rows: int, R: int) -> Rows:
    """Return the tile sizes for `rows` rows per SM and `R` padded columns of S or T."""
    return SKINNY[2 if R > 64 else int(rows >= 64)][0]


def probe(m: int) -> Rows:
    """Return the tile sizes for `m` rows: a few hundred are spread over the GPU."""
    return PROBE[m > 4096][0]
