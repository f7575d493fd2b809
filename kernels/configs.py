"""The one table of tile sizes: for every kernel, kind of GPU and padded rank a few candidates, the best guess first.

Every configuration is compiled by `python -m benchmarks.audit`; tests/kernels/test_compiles.py asserts by its record
that it spills nothing, fits into shared memory and uses the tensor cores. Which of the candidates is fastest is for a
measurement to say.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

Access = Literal["bulk", "vectors", "elements"]
"""How tiles reach shared memory: by the copy engine through tensor descriptors, or by the threads' own loads of 16
bytes or, where rows do not start or end at multiples of 16 elements, of single elements. GPUs that have the engine use
it wherever 16 bytes would do."""
Precision = Literal["16-bit", "tf32", "ieee"]
"""What a product multiplies: bf16 or fp16, fp32 rounded to TF32, or fp32 itself (which no tensor core does)."""
Kernel = Literal["forward", "backward"]
Form = Literal["fused", "dropout", "given", "given, dropout"]
"""S and T computed in the main loop or read from memory; with dropout or without (y of a given S has no mask)."""

PARTS = (80, 90, 100)
# Bytes of shared memory that one program may use. For 80 it is that of compute capability 8.6, 8.9 and 12.0, which use
# the same configurations (8.0 itself has 163 kB).
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Above this rank S and T are not computed in the main loop: their fp32 sums would not fit beside those of the tile.
MAX_FUSED_RANK = 64
# Of ranks that are multiples of this, rows of A, B, S and T are read and written in vectors.
UNIT = 4

_OPTIONS = {"num_warps", "num_stages", "maxnreg"}


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
    maxnreg: int | None = None
    """Registers per thread that ptxas may use; by default it spills a few of them where one program more then fits."""

    @property
    def store_width(self) -> int:
        """Columns of y or dx that leave at once."""
        return self.BN // 2 if self.HALVES else self.BN

    def kernel_arguments(self) -> dict[str, Any]:
        """Return what the kernels take as compile-time arguments."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in _OPTIONS | {"programs"}}

    def meta(self) -> dict[str, Any]:
        """Return the compile-time arguments and the options of the launch."""
        return self.kernel_arguments() | self.options()

    def options(self) -> dict[str, Any]:
        """Return what Triton's compiler is told."""
        return {name: getattr(self, name) for name in sorted(_OPTIONS)}


def part_of(capability: int) -> int:
    """Return the entry of `PARTS` whose configurations a GPU of this compute capability (major, minor) uses."""
    return {9: 90, 10: 100}.get(capability // 10, 80)


class Row(NamedTuple):
    """Candidates for one case of the GEMM kernels, the best guess first."""

    kernels: tuple[Kernel, ...]
    part: int
    access: Access
    precision: Precision
    forms: tuple[Form, ...]
    ranks: tuple[int, ...]
    """Columns of S or T that are computed, or read, at once; a rank is padded to the next of them."""
    candidates: tuple[Gemm, ...]
    one_block: bool = False
    """Whether a layer of one block gets code of its own, without a search for its block and with one pipeline."""
    odd: tuple[Gemm, ...] | None = None
    """The candidates for ranks that are no multiples of 4, where not all of them serve those: every element of A, B, S
    and T then has an address and a mask of its own in registers. Where none does, such calls read by elements."""


_F: tuple[Kernel, ...] = ("forward",)
_B: tuple[Kernel, ...] = ("backward",)
_FB: tuple[Kernel, ...] = ("forward", "backward")

_WIDE = Gemm(128, 256, 64, 8, 3, HALVES=True, FLATTEN=True)
_SQUARE = Gemm(128, 128, 64, 8, 4, FLATTEN=True)
# Two programs share a multiprocessor: the main loop of one runs during the epilogue of the other.
_PAIR = Gemm(128, 128, 32, 4, 5, programs=2, HALVES=True, FLATTEN=True)
# In the input gradient of several blocks the fifth stage costs the registers that are spilled.
_PAIR_OF_4 = dataclasses.replace(_PAIR, num_stages=4)
# With dropout the update of dx needs sums of its own before it is masked: half as many rows keep them in registers.
_LOW = Gemm(64, 128, 64, 8, 4, FLATTEN=True)
# Elements that are not aligned are loaded one by one, each with its address and mask in registers.
_UNALIGNED = Gemm(64, 64, 32, 8, 3)
_NARROW = Gemm(128, 64, 64, 8, 4)
_TINY = Gemm(64, 32, 32, 8, 3)
_SMALL = Gemm(64, 64, 64, 8, 4)

_EXACT = Gemm(16, 32, 16, 8, 2, maxnreg=255)

GEMM: tuple[Row, ...] = (
    Row(_F, 90, "bulk", "16-bit", ("fused",), (16,), (_WIDE, _PAIR, _SQUARE), True, (_SQUARE,)),
    Row(_B, 90, "bulk", "16-bit", ("fused",), (16,), (_WIDE, _PAIR_OF_4, _SQUARE), True, (_SQUARE,)),
    Row(_F, 90, "bulk", "16-bit", ("fused",), (32,), (_WIDE, _SQUARE), True, (_SQUARE,)),
    Row(_B, 90, "bulk", "16-bit", ("fused",), (32,), (_SQUARE,), True),
    Row(_F, 90, "bulk", "16-bit", ("fused",), (64,), (_SQUARE,), True, (_SMALL,)),
    Row(_B, 90, "bulk", "16-bit", ("fused",), (64,), (_SQUARE,), True, ()),
    Row(_F, 90, "bulk", "16-bit", ("dropout",), (16,), (_SQUARE,), True),
    Row(_F, 90, "bulk", "16-bit", ("dropout",), (32,), (_LOW,), True),
    Row(_F, 90, "bulk", "16-bit", ("dropout",), (64,), (_LOW,), True, (_SMALL,)),
    Row(_B, 90, "bulk", "16-bit", ("dropout",), (16, 32, 64), (_LOW,), True),
    Row(_FB, 90, "bulk", "16-bit", ("given",), (16,), (_WIDE, _SQUARE), True),
    Row(_FB, 90, "bulk", "16-bit", ("given",), (64,), (_SQUARE,), True, (_LOW,)),
    Row(_B, 90, "bulk", "16-bit", ("given, dropout",), (16,), (_SQUARE,)),
    Row(_B, 90, "bulk", "16-bit", ("given, dropout",), (64,), (_SQUARE,), odd=(_LOW,)),
    Row(_FB, 90, "bulk", "tf32", ("fused",), (16,), (Gemm(128, 128, 32, 8, 3, FLATTEN=True),)),
    Row(_F, 90, "bulk", "tf32", ("fused",), (64,), (Gemm(64, 128, 32, 8, 3, FLATTEN=True),), odd=(_UNALIGNED,)),
    Row(_B, 90, "bulk", "tf32", ("fused",), (64,), (_UNALIGNED,), odd=(_TINY,)),
    Row(_F, 90, "bulk", "tf32", ("dropout",), (16,), (Gemm(64, 128, 32, 8, 3, FLATTEN=True),)),
    Row(_F, 90, "bulk", "tf32", ("dropout",), (64,), (Gemm(64, 128, 32, 8, 3, FLATTEN=True),), odd=(_UNALIGNED,)),
    Row(_B, 90, "bulk", "tf32", ("dropout",), (16,), (_UNALIGNED,)),
    Row(_B, 90, "bulk", "tf32", ("dropout",), (64,), (_UNALIGNED,), odd=(_TINY,)),
    Row(_FB, 90, "bulk", "tf32", ("given",), (64,), (Gemm(128, 128, 32, 8, 3),), odd=(_UNALIGNED,)),
    Row(_B, 90, "bulk", "tf32", ("given, dropout",), (64,), (Gemm(64, 128, 32, 8, 3),)),
    Row(_FB, 100, "bulk", "16-bit", ("fused",), (16,), (Gemm(128, 128, 64, 4, 3),), True, (_NARROW,)),
    Row(_F, 100, "bulk", "16-bit", ("fused",), (64,), (Gemm(128, 128, 64, 8, 3),), True, (_NARROW,)),
    Row(_B, 100, "bulk", "16-bit", ("fused",), (64,), (Gemm(128, 128, 64, 8, 3),), True, (_SMALL,)),
    Row(_FB, 100, "bulk", "16-bit", ("dropout",), (16,), (dataclasses.replace(_NARROW, maxnreg=255),), True),
    Row(_F, 100, "bulk", "16-bit", ("dropout",), (64,), (Gemm(128, 128, 64, 8, 3),), True, (_SMALL,)),
    Row(_B, 100, "bulk", "16-bit", ("dropout",), (64,), (_NARROW,), True, (_SMALL,)),
    Row(_FB, 100, "bulk", "16-bit", ("given",), (16,), (Gemm(128, 256, 64, 8, 3, HALVES=True),), True),
    Row(_FB, 100, "bulk", "16-bit", ("given",), (64,), (Gemm(128, 128, 64, 8, 3),), True, (_NARROW,)),
    Row(_B, 100, "bulk", "16-bit", ("given, dropout",), (16, 64), (_NARROW,)),
    Row(_F, 100, "bulk", "tf32", ("fused",), (16, 64), (Gemm(64, 128, 32, 8, 3),)),
    Row(_B, 100, "bulk", "tf32", ("fused",), (16,), (Gemm(64, 128, 32, 8, 3),)),
    Row(_B, 100, "bulk", "tf32", ("fused",), (64,), (Gemm(64, 128, 32, 8, 3),), odd=(Gemm(64, 32, 16, 8, 3),)),
    Row(_F, 100, "bulk", "tf32", ("dropout",), (16, 64), (Gemm(64, 128, 32, 8, 3, maxnreg=255),)),
    Row(_B, 100, "bulk", "tf32", ("dropout",), (16,), (Gemm(64, 128, 32, 8, 3),)),
    Row(_B, 100, "bulk", "tf32", ("dropout",), (64,), (_UNALIGNED,), odd=(Gemm(64, 64, 16, 8, 3),)),
    Row(_FB, 100, "bulk", "tf32", ("given", "given, dropout"), (64,), (Gemm(64, 64, 32, 8, 3, maxnreg=255),)),
    Row(_F, 80, "vectors", "16-bit", ("fused",), (16,), (Gemm(128, 128, 32, 8, 4),), True),
    Row(_F, 80, "vectors", "16-bit", ("fused",), (32, 64), (Gemm(128, 64, 32, 8, 4),), True),
    Row(_B, 80, "vectors", "16-bit", ("fused",), (16,), (Gemm(128, 64, 32, 8, 4),), True),
    Row(_B, 80, "vectors", "16-bit", ("fused",), (32,), (Gemm(64, 64, 32, 8, 4),), True),
    Row(_B, 80, "vectors", "16-bit", ("fused",), (64,), (Gemm(64, 64, 32, 8, 4),), True, (Gemm(64, 32, 32, 8, 4),)),
    Row(_FB, 80, "vectors", "16-bit", ("given",), (16,), (Gemm(128, 128, 32, 8, 4),), True),
    Row(_FB, 80, "vectors", "16-bit", ("given",), (64,), (Gemm(128, 128, 32, 8, 4),), True, (Gemm(128, 64, 32, 8, 4),)),
    Row(_F, 80, "vectors", "16-bit", ("dropout",), (16, 64), (Gemm(64, 64, 32, 8, 4),)),
    Row(_B, 80, "vectors", "16-bit", ("dropout",), (16,), (Gemm(64, 64, 32, 8, 4),)),
    Row(_B, 80, "vectors", "16-bit", ("dropout",), (64,), (Gemm(64, 64, 32, 8, 4),), odd=(Gemm(64, 32, 32, 8, 4),)),
    Row(_B, 80, "vectors", "16-bit", ("given, dropout",), (16, 64), (Gemm(128, 64, 32, 8, 4),)),
    Row(_F, 80, "vectors", "tf32", ("fused",), (16, 64), (Gemm(64, 64, 32, 8, 3),)),
    Row(_B, 80, "vectors", "tf32", ("fused",), (16,), (Gemm(64, 64, 32, 8, 3),)),
    Row(_B, 80, "vectors", "tf32", ("fused",), (64,), (Gemm(64, 64, 32, 8, 3),), odd=(Gemm(64, 64, 16, 8, 3),)),
    Row(_FB, 80, "vectors", "tf32", ("dropout",), (16, 64), (Gemm(64, 64, 16, 8, 3),)),
    Row(_FB, 80, "vectors", "tf32", ("given", "given, dropout"), (64,), (Gemm(64, 64, 32, 8, 3),)),
    Row(_F, 80, "elements", "16-bit", ("fused", "dropout"), (16, 64), (_UNALIGNED,)),
    Row(_B, 80, "elements", "16-bit", ("fused", "dropout"), (16, 64), (Gemm(64, 64, 16, 8, 2),)),
    Row(_FB, 80, "elements", "16-bit", ("given", "given, dropout"), (64,), (_UNALIGNED,)),
    Row(_F, 80, "elements", "tf32", ("fused", "dropout"), (16, 64), (Gemm(64, 64, 16, 8, 2),)),
    Row(_B, 80, "elements", "tf32", ("fused", "dropout"), (16,), (Gemm(64, 64, 16, 8, 2),)),
    Row(_B, 80, "elements", "tf32", ("fused", "dropout"), (64,), (Gemm(32, 64, 16, 8, 2),)),
    Row(_FB, 80, "elements", "tf32", ("given", "given, dropout"), (64,), (_UNALIGNED,)),
    Row(_F, 90, "elements", "16-bit", ("fused", "dropout"), (16, 64), (_UNALIGNED,)),
    Row(_B, 90, "elements", "16-bit", ("fused", "dropout"), (16, 64), (Gemm(64, 64, 16, 8, 2),)),
    Row(_FB, 90, "elements", "16-bit", ("given", "given, dropout"), (64,), (_UNALIGNED,)),
    Row(_FB, 100, "elements", "16-bit", ("fused", "dropout"), (16, 64), (_UNALIGNED,)),
    Row(_FB, 100, "elements", "16-bit", ("given", "given, dropout"), (64,), (_UNALIGNED,)),
    # Products of fp32 itself are for being exact, not for being fast: cuBLAS has more registers to spend.
    *(Row(_FB, part, "elements", "ieee", ("fused", "dropout"), (16, 64), (_EXACT,)) for part in PARTS),
    *(Row(_FB, part, "elements", "ieee", ("given", "given, dropout"), (64,), (_EXACT,)) for part in PARTS),
)


class Choice(NamedTuple):
    """What the table says about one call."""

    access: Access
    precision: Precision
    R: int
    """The padded rank, or that of one of the pieces in which a given S or T is read."""
    one_block: bool
    """Whether a layer of one block has code of its own."""
    candidates: tuple[Gemm, ...]
    """Tile sizes, the best guess first."""
    unit: int
    """4 where the rank is a multiple of it, else 1."""

    @property
    def dot(self) -> str:
        """The precision of a product as Triton spells it."""
        return "tf32" if self.precision == "tf32" else "ieee"


def gemm(
    kernel: Kernel,
    part: int,
    access: Access,
    precision: Precision,
    r: int,
    width: int,
    given: bool = False,
    dropout: bool = False,
) -> Choice:
    """Return the candidates for a call.

    `width` is the number of columns that tiles have to cover: those of a block for "forward", K for "backward".
    Candidates that would compute more than an eighth in vain come after the others.
    """
    if given:
        form: Form = "given, dropout" if dropout and kernel == "backward" else "given"
    else:
        form = "dropout" if dropout else "fused"
    rows = _rows()[kernel, part, access, precision, form]
    R, row = next((found for found in rows if r <= found[0]), rows[-1])
    unit = 1 if r % UNIT else UNIT
    candidates = row.candidates if unit > 1 or row.odd is None else row.odd
    by_waste = sorted(candidates, key=lambda c: 8 * (-width % c.BN) > width)
    return Choice(access, precision, R, row.one_block, tuple(by_waste), unit)


@functools.cache
def _rows() -> dict[tuple[Kernel, int, Access, Precision, Form], list[tuple[int, Row]]]:
    """The table by case, with rising padded ranks."""
    result: dict[tuple[Kernel, int, Access, Precision, Form], list[tuple[int, Row]]] = {}
    for row in GEMM:
        for kernel in row.kernels:
            for form in row.forms:
                found = result.setdefault((kernel, row.part, row.access, row.precision, form), [])
                found += [(R, row) for R in row.ranks]
    return {case: sorted(found, key=lambda entry: entry[0]) for case, found in result.items()}
