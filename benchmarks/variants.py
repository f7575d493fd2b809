"""The two GEMM kernels with every configuration of `kernels/configs.py`, to be compiled."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.compiled import Variant
from slora.kernels import configs
from slora.kernels.linear_backward import linear_backward
from slora.kernels.linear_forward import linear_forward

_INTEGERS = ("drop", "M", "N", "K", "n", "r", "blocks", "slots", "stride_x", "stride_dy", "stride_w")
# What Triton is told not to look at (`do_not_specialize`), so nothing is known of it.
_UNKNOWN = frozenset({"drop", "M", "blocks", "slots"})


def gemm_variant(
    kernel: configs.Kernel, part: int, access: configs.Access, precision: configs.Precision, form: configs.Form, R: int,
    tile: configs.Gemm, one_block: bool, unit: int, even: bool = False,
) -> Variant:  # fmt: skip
    """Return `linear_forward` or `linear_backward` with a bias and fp32 A and B, which asks for the most.

    No more is known of its numbers than holds for every shape that the configuration serves; or, where they are `even`,
    that all are multiples of 16, as in most models, for which the compiler makes other code.
    """
    element = "bf16" if precision == "16-bit" else "fp32"
    given, dropout, bulk = form.startswith("given"), "dropout" in form, access == "bulk"

    def matrix(*shape: int) -> str:
        return f"tensordesc<{element}{list(shape)}>" if bulk else f"*{element}"

    types = dict.fromkeys(_INTEGERS, "i32")
    types |= {"gate": "*fp32", "seed": "*i64", "threshold": "fp32", "scaling": "fp32", "bias": f"*{element}"}
    if kernel == "forward":
        types |= {"x": matrix(tile.BM, tile.BK), "W": matrix(tile.BN, tile.BK), "A": matrix(R, tile.BK)}
        types |= {"B": "*fp32", "S": f"*{element}", "y": matrix(tile.BM, 1, tile.store_width)}
        described = ("x", "W") if given else ("x", "W", "A")
    else:
        types |= {"dy": matrix(tile.BM, tile.BK), "W": matrix(tile.BK, tile.BN), "B": matrix(tile.BK, R)}
        types |= {"A": "*fp32", "T": f"*{element}", "dx": matrix(tile.BM, 1, tile.store_width)}
        described = ("dy", "W") if given else ("dy", "W", "B")
    constants = {
        "GIVEN": given, "DROPOUT": dropout, "ONE_BLOCK": one_block, "DESCRIBED": bulk,
        "PRECISION": "tf32" if precision == "tf32" else "ieee", "R": R, "UNIT": unit, **tile.kernel_arguments(),
    }  # fmt: skip
    if given:
        constants["A" if kernel == "forward" else "B"] = None
    if not dropout:
        constants["seed"] = None
    return Variant(
        kernel=linear_forward if kernel == "forward" else linear_backward,
        part=part,
        label=f"{access}, {precision}, {form}, R={R}, "
        f"{'all % 16 == 0' if even else 'r % 4 == 0' if unit > 1 else 'any r'}, {tile}, "
        f"{'one block' if one_block else 'several blocks'}",
        types=types,
        constants=constants,
        options=tile.options(),
        unaligned=_UNKNOWN if even else _UNKNOWN | {"r"} if access == "vectors" else frozenset(_INTEGERS),
        tensor_cores=precision != "ieee",
        described=described if bulk else (),
        stores_described=bulk,
        programs=tile.programs,
    )


def gemm_variants(kernel: configs.Kernel, part: int) -> Iterator[Variant]:
    """Yield every case of the table for one kernel and part."""
    for row in configs.GEMM:
        if row.part != part or kernel not in row.kernels:
            continue
        for form in row.forms:
            if form == "given, dropout" and kernel == "forward":
                continue
            for R in row.ranks:
                for tile, unit, even in _sizes(row):
                    for one_block in (True, False) if row.one_block else (False,):
                        # The input gradient of a given T is one code for any number of blocks.
                        if not (one_block and kernel == "backward" and form.startswith("given")):
                            yield gemm_variant(
                                kernel, part, row.access, row.precision, form, R, tile, one_block, unit, even
                            )


def _sizes(row: configs.Row) -> Iterator[tuple[configs.Gemm, int, bool]]:
    """Each tile of the row with what may be known of the rank and of all sizes."""
    for tile in dict.fromkeys(row.candidates + (row.odd or ())):
        yield tile, 1 if row.odd is None or tile in row.odd else configs.UNIT, False
    if row.access != "elements":
        yield from ((tile, configs.UNIT, True) for tile in row.candidates)
