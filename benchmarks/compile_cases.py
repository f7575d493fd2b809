"""Every kernel with every candidate of `kernels/configs.py`, to be compiled, each in the most demanding case it serves.

That is the widest S and T that the tiles are for, with a bias, and with dropout where it may be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from slora.kernels import cast, configs, gate_probe, linear, skinny
from slora.kernels import weight_gradients as wg

# What does products of tiles at full speed, by arch.
OWN = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}

# What is no integer.
_TYPES = (
    dict.fromkeys("x dy rows W A B S T low inner outer factor bias out dA dB".split(), "*bf16")
    | dict.fromkeys(("gate", "partial_A", "partial_B", "dots", "dgate"), "*fp32")
    | {"seed": "*i64", "seed_offset": "*i64", "threshold": "fp32", "scaling": "fp32"}
)


class CompileCase(NamedTuple):
    """A kernel with the types and compile-time values of one call."""

    kernel: Any
    arch: int
    label: str
    """Unique for a kernel and arch."""
    types: dict[str, str]
    """Of each argument that is no constant, as Triton writes it."""
    constants: dict[str, Any]
    options: dict[str, Any]
    """num_warps, num_stages and the like."""
    products: frozenset[str]
    """The instructions that may do its products of tiles."""
    programs: int = 1
    """How many are meant to share an SM."""


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Yield everything that is compiled for one arch."""
    tma = arch >= 90

    def box(*shape: int) -> str:
        return f"tensordesc<bf16{list(shape)}>" if tma else "*bf16"

    for (of, variant), candidates in configs.GEMMS.items():
        for tile, R in candidates if of == arch else ():
            common: dict[str, Any] = {
                "R": R,
                "DESCRIBED": tma,
                "DROPOUT": variant == "masked",
            }
            types = {"rows": box(tile.BM, tile.BK), "out": box(tile.BM, 1, tile.store_width)}
            kernel: Any = linear.fused_linear
            if variant in ("precomputed", "masked"):
                kernel = linear.precomputed_linear
                types["rows"] = box(1, tile.BM, tile.BK)
                common |= {"R": 32} if variant == "masked" else {"R": 0, "seed": None}
            for forward in [False] if variant == "masked" else [True, False]:
                inner = (R, tile.BK) if forward else (tile.BK, R)
                rank = "any rank" if R == configs.ANY_WIDTH else f"R={R}"
                label = f"{'y' if forward else 'dx'}{', masked' * (variant == 'masked')}, {rank}"
                constants = common | {"FORWARD": forward} | ({} if forward else {"bias": None})
                of_call = types | {"W": box(*tile.of_weight(forward)), "inner": box(*inner)}
                if variant == "precomputed":
                    of_call |= {"low": types["rows"], "factor": of_call["W"]}
                yield _case(kernel, arch, label, tile, of_call, constants)
    for columns, low in configs.WEIGHT_GRADIENTS[arch]:
        types = dict.fromkeys(("x", "dy"), box(columns.ROWS, columns.TILE))
        constants = {"LOW_A": low, "LOW_B": low, "DROPOUT": True, "DESCRIBED": tma}
        yield _case(wg.partial_sums, arch, f"{low} columns", columns, types, constants)
    constants = {"CHUNK": wg.CHUNK, "AT_ONCE": wg.AT_ONCE}
    yield _case(wg.reduce, arch, "", None, {}, constants, frozenset())
    for rows, R in configs.SKINNY:
        yield _case(skinny.skinny, arch, f"R={R}", rows, {}, {"R": R, "DROPOUT": True})
    for rows, R in configs.PROBE:
        yield _case(gate_probe.probe, arch, f"R={R}", rows, {"out": "*fp32"}, {"R": R})
    yield _case(gate_probe.copy_rows, arch, "", configs.COPY, {}, {}, frozenset())
    types = dict.fromkeys("AB", "*fp32") | dict.fromkeys(("low_A", "low_B"), "*bf16")
    yield _case(cast.cast_both, arch, "", None, types, {"CHUNK": cast.CHUNK}, frozenset(), num_warps=4)


def _case(
    kernel: Any, arch: int, label: str, tile: Any, types: dict[str, str], constants: dict[str, Any],
    products: frozenset[str] | None = None, num_warps: int = 2,
) -> CompileCase:  # fmt: skip
    """A case with bf16 matrices, and integers where nothing else is said."""
    meta = tile.meta() if tile else {"num_warps": num_warps}
    options = {name: value for name, value in meta.items() if name.startswith("num_")}
    given = constants | {name: value for name, value in meta.items() if name not in options}
    sizes = "x".join(str(value) for name, value in meta.items() if name in ("BM", "BN", "BK", "TILE", "ROWS"))
    size = f"{sizes} {options['num_warps']} warps {options.get('num_stages', 3)} stages".strip()
    if products is None:
        # Tiles that no descriptor brings may be below what wgmma and tcgen05 take.
        described = any(kind.startswith("tensordesc") for kind in types.values())
        products = frozenset({OWN[arch]} if described else {OWN[arch], "mma.sync"})
    return CompileCase(
        kernel=kernel,
        arch=arch,
        label=", ".join(filter(None, (label, size))),
        types={name: (_TYPES | types).get(name, "i32") for name in kernel.arg_names if name not in given},
        constants={name: value for name, value in given.items() if name in kernel.arg_names},
        options=options,
        products=products,
        programs=getattr(tile, "programs", 1),
    )
