"""Tile sizes: for every kernel, arch and padded rank a few candidates, of which a measurement picks one per shape.

`python -m benchmarks.audit` compiles each of them; benchmarks/results/audit/kernels.json is what it found: none spills,
all fit into shared memory and use the arch's own tensor-core instructions.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

ARCHS = (80, 90, 100)
# Bytes of shared memory that one program may use. For 80 it is that of compute capability 8.6, 8.9 and 12.0, which use
# the same tiles (8.0 itself has 163 kB).
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
RANKS = (16, 32, 64, 128, 256)
"""Columns of S, T, A and B that kernels compute with; what a rank lacks to the next of them is masked."""
ANY_WIDTH = 512
"""Stands for more packed columns of T than the largest of `RANKS`, which the input gradient adds in a loop."""
# Above this rank S and T are not computed in the main loop: their fp32 sums would not fit beside those of the tile.
MAX_FUSED_RANK = 64

Form = Literal["fused", "precomputed", "masked"]
"""S or T computed in the main loop, or read; with a dropout mask on the update of dx."""


@dataclasses.dataclass(frozen=True)
class Gemm:
    """Tile sizes of `linear_forward`, `linear_backward` and `linear_precomputed`."""

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

    def meta(self) -> dict[str, Any]:
        """Return the compile-time arguments and the options of the launch."""
        return {name: value for name, value in vars(self).items() if name != "programs"}


@dataclasses.dataclass(frozen=True)
class Rows:
    """Tile sizes of `skinny` and `gate_probe`, whose programs own rows and walk along the columns of x or dy."""

    BM: int
    BK: int
    num_warps: int
    num_stages: int

    def meta(self) -> dict[str, Any]:
        """Return the compile-time arguments and the options of the launch."""
        return vars(self)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Tile sizes of `weight_gradients`, whose programs own columns of x or dy and walk along the rows."""

    TILE: int
    """Columns of x or dy that a program owns."""
    ROWS: int
    """Rows per step of its loop."""
    TALL: bool
    """Whether the product is formed as TILE x LOW, which wgmma wants, or as LOW x TILE, which mma can pipeline."""
    num_warps: int
    num_stages: int

    def meta(self) -> dict[str, Any]:
        """Return the compile-time arguments and the options of the launch."""
        return vars(self)


def arch_of(major: int) -> int:
    """Return the entry of `ARCHS` whose tiles a GPU of compute capability `major` uses."""
    return {9: 90, 10: 100}.get(major, 80)


def padded(r: int) -> int:
    """Return the entry of `RANKS` that holds `r` columns, else `ANY_WIDTH`."""
    return next((R for R in RANKS if r <= R), ANY_WIDTH)


_WIDE = Gemm(128, 256, 64, 8, 3, HALVES=True, FLATTEN=True)
_TALL = Gemm(256, 128, 64, 8, 3, HALVES=True, FLATTEN=True)
_SQUARE = Gemm(128, 128, 64, 8, 4, FLATTEN=True)
_LOW = Gemm(64, 128, 64, 8, 4, FLATTEN=True)
# Two programs share an SM: the main loop of one runs during the epilogue of the other.
_PAIR = Gemm(128, 128, 32, 4, 4, programs=2, HALVES=True, FLATTEN=True)


def gemm(arch: int, form: Form, R: int) -> tuple[Gemm, ...]:
    """Return the candidates of a form for S or T of the padded width `R`, the best guess first.

    Of R in the main loop fewer columns of y or dx fit into the registers (sm_80, sm_90) or the tensor memory (sm_100).
    `FLATTEN` is for sm_90: elsewhere it costs registers, or the compiler fails.
    """
    if arch == 90:
        if form == "fused":
            return (_SQUARE, _LOW) if R > 32 else (_WIDE, _PAIR, _SQUARE, *([_TALL] if R == 16 else []))
        return (_TALL, _SQUARE) if form == "masked" or R > 64 else (_WIDE, _TALL, _PAIR, _SQUARE)
    if arch == 100:
        narrow, square = Gemm(128, 64, 64, 8, 4), Gemm(128, 128, 64, 8 if form == "masked" or R > 32 else 4, 3)
        return (Gemm(128, 256, 64, 8, 3, HALVES=True), square, narrow) if form == "precomputed" else (square, narrow)
    sizes = ((128, 128), (128, 64), (64, 64))
    first = 1 if form == "masked" or (form == "fused" and R > 32) else 0
    return tuple(Gemm(BM, BN, 32, 8 if BM > 64 else 4, 4) for BM, BN in sizes[first : first + 2])


def weight_gradients(arch: int, low: int) -> tuple[Columns, ...]:
    """Return the candidates for products with `low` padded columns of S or T, at most 128, the best guess first."""
    tall = arch >= 90
    if low > 64:
        return (Columns(128, 32, tall, 8, 3), Columns(128, 64, tall, 8, 2))
    short, long = Columns(128, 32, tall, 4, 4), Columns(128, 64, tall, 4, 3)
    if low > 32:
        return (short,)
    return (long, short, *((Columns(256, 64, tall, 8, 3),) if arch >= 90 else ()))


def skinny(rows: int, R: int) -> Rows:
    """Return the tile sizes for `rows` rows per SM and `R` padded columns of S or T."""
    BM = 16 if rows < 64 else 64 if rows < 128 or R > 64 else 128
    return Rows(BM, 64, 4, 3) if R <= 64 else Rows(BM, 32, 4 if R <= 128 and BM == 16 else 8, 3)


def probe(m: int, R: int) -> Rows:
    """Return the tile sizes for `m` rows and `R` padded columns, at most 64: a few hundred are spread over the GPU."""
    if m > 4096:
        return Rows(32, 64, 4 if R < 64 else 8, 3)
    return Rows(16, 128 if R < 32 else 64, 4, 3)


# Of the copy of sampled rows.
COPY = Rows(8, 256, 4, 2)
