"""Tile sizes of the kernels beside the two GEMMs; the table of those is `configs.py`.

Every configuration is compiled by `python -m benchmarks.audit`; tests/kernels/test_compiles.py asserts by its record
that it spills nothing, fits into shared memory and uses the tensor cores.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from slora.kernels.configs import Precision


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
    maxnreg: int | None = None
    """As for `configs.Gemm`."""

    def meta(self) -> dict[str, Any]:
        """Return what the kernel takes as compile-time arguments and launch options."""
        return dataclasses.asdict(self)


def weight_gradients(part: int, precision: Precision, low: int) -> tuple[Columns, ...]:
    """Return the tile sizes for products with `low` padded columns of S or T, at most 128, the best guess first."""
    # Without tensor cores the tall product spills less; transposed, it is the masked tile that is spread over threads.
    tall = part >= 90 or precision == "ieee"
    if precision == "ieee":
        return (Columns(128, 32, tall, 4, 3) if low <= 32 else Columns(64, 16, tall, 8, 2, 255),)
    if precision == "tf32":
        maxnreg = 255 if part < 90 else None
        return (Columns(128, 32, tall, 4, 3, maxnreg) if low <= 64 else Columns(128, 32, tall, 8, 2),)
    if low > 64:
        return (Columns(128, 32, tall, 8, 3), Columns(128, 64, tall, 8, 2))
    short, long = Columns(128, 32, tall, 4, 4), Columns(128, 64, tall, 4, 3)
    if low > 32:
        return (short,)
    wide = (Columns(256, 64, tall, 8, 3),) if part >= 90 else ()
    return (long, short, *wide)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Tile sizes of `skinny` and `gate_probe`, whose programs own rows and walk along the columns of x or dy."""

    BM: int
    BK: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    """As for `configs.Gemm`."""

    def meta(self) -> dict[str, Any]:
        """Return what the kernels take as compile-time arguments and launch options."""
        return dataclasses.asdict(self)


def skinny(precision: Precision, rows: int, low: int, aligned: bool = True) -> Rows:
    """Return the tile sizes for `rows` rows per multiprocessor and `low` padded columns of S or T, at most 128.

    `aligned` says that rows are read in vectors, not by elements, each with an address and a mask in registers.
    """
    if not aligned:
        # Without tensor cores a thread holds its share of both factors as well.
        BK, small = (16, low > 64) if precision == "ieee" else (32, False)
        return Rows(16, BK, 4, 2, 255) if small or rows < 64 else Rows(64, BK, 8, 2, 255)
    BM = 128 if rows >= 128 else 64 if rows >= 64 else 16
    if precision == "ieee" and low >= 64:
        BM = min(BM, 64 if low == 64 else 16)
    # 128 bytes of a row per step.
    BK = 64 if precision == "16-bit" else 32
    if low <= 64:
        return Rows(BM, BK, (1 if low < 64 else 2) if BM == 16 else 4, 3)
    if BM < 128:
        return Rows(BM, BK, 4, 3)
    return Rows(BM, BK, 8, 2, 255) if precision == "16-bit" else Rows(BM, BK, 8, 3)


def gate_probe(precision: Precision, m: int, low: int, layers: int = 1, aligned: bool = True) -> Rows:
    """Return the tile sizes for `m` rows, `low` padded columns of S and T, at most 64, and `layers` layers.

    A few hundred rows are spread over the GPU; all of them come in larger tiles. `aligned` is as for `skinny`; where
    several layers share a launch, the compiler knows nothing of their rows.
    """
    if precision != "16-bit" and layers > 1:
        return Rows(16, 16, 8, 1, 255)
    if precision == "ieee":
        return Rows(16, 16, 8, 2, 255)
    if precision == "tf32":
        return Rows(16, 64, 4, 3) if aligned and low < 64 else Rows(16, 32, 4, 2, 255)
    if not aligned or layers > 1:
        return Rows(16, 32, 8, 2, 255)
    if m > 4096:
        return Rows(32, 64, 4 if low < 64 else 8, 3)
    return Rows(16, 128 if low < 32 else 64, 4, 3)


# Of the copy of sampled rows.
SAMPLE = {"BM": 8, "BK": 256, "num_warps": 4}
