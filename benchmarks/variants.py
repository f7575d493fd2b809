"""Every kernel with every candidate of `kernels/configs.py`, to be compiled, each in the most demanding case it serves.

That is the largest of the padded ranks that share their tiles, with a bias, and with dropout where it may be. The input
gradient in the main loop is other code for one block and for several.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.compiled import Variant
from slora.kernels import configs, gate_probe, linear_backward, linear_forward, linear_precomputed, skinny
from slora.kernels import weight_gradients as wg

_TYPES = {
    "gate": "*fp32", "seed": "*i64", "threshold": "fp32", "scaling": "fp32", "partial_A": "*fp32", "partial_B": "*fp32",
    "dots": "*fp32", "dgate": "*fp32", "seed_offset": "*i64",
}  # fmt: skip
_MATRICES = ("x", "dy", "W", "A", "B", "S", "T", "y", "dx", "bias", "rows", "low", "right", "dA", "dB", "out")


def variants(arch: int) -> Iterator[Variant]:
    """Yield everything that is compiled for one arch."""
    for form in ("fused", "precomputed", "masked"):
        ranks = [R for R in (*configs.RANKS, configs.ANY_WIDTH) if form != "fused" or R <= configs.MAX_FUSED_RANK]
        for R in ranks:
            following = [configs.gemm(arch, form, other) for other in ranks if R < other <= configs.RANKS[-1]]
            for tile in configs.gemm(arch, form, R):
                if form == "fused" or R == configs.ANY_WIDTH or not any(tile in tiles for tiles in following):
                    yield from _gemm(arch, form, R, tile)
    yield from _weight_gradients(arch)
    yield from _by_rows(arch)


def _gemm(arch: int, form: str, R: int, tile: configs.Gemm) -> Iterator[Variant]:
    def box(*shape: int) -> str:
        return f"tensordesc<bf16{list(shape)}>" if arch >= 90 else "*bf16"

    left, store = box(tile.BM, tile.BK), box(tile.BM, 1, tile.store_width)
    forward, backward = box(tile.BN, tile.BK), box(tile.BK, tile.BN)
    common: dict[str, Any] = {"R": R, "DESCRIBED": arch >= 90}
    if form == "fused":
        types = {"x": left, "W": forward, "A": box(R, tile.BK), "y": store}
        yield _variant(linear_forward.fused_forward, arch, f"R={R}", types, tile, common, ("x", "W", "A"))
        types = {"dy": left, "W": backward, "B": box(tile.BK, R), "dx": store}
        for one in (True, False):
            label = f"R={R}, {'one block' if one else 'several blocks'}"
            constants = common | {"ONE_BLOCK": one}
            yield _variant(linear_backward.fused_backward, arch, label, types, tile, constants, ("dy", "W", "B"))
        return
    common |= {"DROPOUT": form == "masked", **linear_precomputed.unrolled(R, tile)}
    common |= {} if form == "masked" else {"seed": None}
    for name, W, more in (("y", forward, {"FORWARD": True}), ("dx", backward, {"FORWARD": False, "bias": None})):
        if name == "y" and (form == "masked" or R == configs.ANY_WIDTH):
            continue
        types, label = {"rows": left, "W": W, "out": store}, f"{name}{', masked' * (form == 'masked')}, R={R}"
        kernel = linear_precomputed.linear_precomputed
        yield _variant(kernel, arch, label, types, tile, common | more, ("rows", "W"))


def _weight_gradients(arch: int) -> Iterator[Variant]:
    for low, following in ((16, 32), (32, 64), (64, 128), (128, 0)):
        for tile in configs.weight_gradients(arch, low):
            if following and tile in configs.weight_gradients(arch, following):
                continue
            box = f"tensordesc<bf16[{tile.ROWS}, {tile.TILE}]>" if arch >= 90 else "*bf16"
            constants = {"LOW_A": low, "LOW_B": low, "DROPOUT": True, "DESCRIBED": arch >= 90}
            types = {"x": box, "dy": box}
            yield _variant(wg.partial_sums, arch, f"{low} columns", types, tile, constants, ("x", "dy"))
    constants = {"TILE": 128, "LOW_A": 64, "LOW_B": 16, "WIDE": wg.WIDE, "NARROW": wg.NARROW, "AT_ONCE": wg.AT_ONCE}
    yield _variant(wg.reduce, arch, "all three", {}, {"num_warps": 2}, constants, tensor_cores=False)


def _by_rows(arch: int) -> Iterator[Variant]:
    cases = {configs.skinny(rows, R): R for R in configs.RANKS for rows in (16, 64, 128)}
    for tile, R in cases.items():
        yield _variant(skinny.skinny, arch, f"R={R}", {}, tile, {"R": R, "DROPOUT": True}, copies_ahead=True)
    for tile, R in {configs.probe(m, R): R for R in (16, 32, 64) for m in (512, 50432)}.items():
        yield _variant(gate_probe.probe, arch, f"R={R}", {"out": "*fp32"}, tile, {"R": R}, copies_ahead=True)
    yield _variant(gate_probe.copy_rows, arch, "", {}, configs.COPY, {}, tensor_cores=False)


def _variant(
    kernel: Any, arch: int, label: str, types: dict[str, str], tile: Any, constants: dict[str, Any],
    described: tuple[str, ...] = (), **more: Any,
) -> Variant:  # fmt: skip
    """A variant with bf16 matrices, and integers where nothing else is said."""
    meta = tile if isinstance(tile, dict) else tile.meta()
    options = {name: value for name, value in meta.items() if name.startswith("num_")}
    constants = constants | {name: value for name, value in meta.items() if name not in options}
    types = dict.fromkeys(_MATRICES, "*bf16") | _TYPES | types
    names = [name for name in kernel.arg_names if name not in constants]
    sizes = [value for name, value in meta.items() if name in ("BM", "BN", "BK", "TILE", "ROWS")]
    size = f"{'x'.join(map(str, sizes))} {options['num_warps']} warps {options.get('num_stages', 3)} stages"
    gemm = bool(described) and kernel is not wg.partial_sums
    return Variant(
        kernel=kernel,
        arch=arch,
        label=", ".join(filter(None, (label, size))),
        types={name: types.get(name, "i32") for name in names},
        constants=constants,
        options=options,
        # Below what wgmma and tcgen05 take.
        older_products=not gemm and (not described or arch < 90),
        described=described if arch >= 90 else (),
        stores_described=gemm and arch >= 90,
        programs=getattr(tile, "programs", 1),
        **more,
    )
