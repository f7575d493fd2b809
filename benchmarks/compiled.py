"""What the compiler makes of a kernel, without a GPU: registers, stack, shared memory, instructions.

A `Variant` is a kernel with the types and compile-time values of one call. Compiling needs functions that are not
Triton's interpreter's, so whoever runs under TRITON_INTERPRET (the tests) does this in a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
from typing import Any

REGISTERS = 65536
# Per SM: bytes of shared memory, of which each program needs 1 KiB more than it asks for, and warps.
SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
WARPS = 64
TENSOR_MEMORY_COLUMNS = 512
# What does products of tiles at full speed.
OWN = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One thing to compile."""

    kernel: Any
    """A function under `triton.jit`."""
    arch: int
    """80, 90 or 100."""
    label: str
    """What it is, for people: unique for a kernel and arch."""
    types: dict[str, str]
    """The type of each argument that is no constant, as Triton writes it."""
    constants: dict[str, Any]
    options: dict[str, Any]
    """num_warps, num_stages and the like."""
    products: frozenset[str]
    """The instructions that may do its products of tiles."""
    programs: int = 1
    """How many programs are meant to share an SM."""

    @property
    def described(self) -> set[str]:
        """The arguments whose tiles TMA should bring, or take away: `out`."""
        return {name for name, kind in self.types.items() if kind.startswith("tensordesc")}


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a variant."""

    registers: int
    stack: int
    """Bytes per thread."""
    spilled: int
    """Bytes per thread, stores and loads."""
    shared: int
    """Bytes per program."""
    tensor_memory: int
    """Columns of tensor memory; 0 before sm_100."""
    occupancy: int
    """Programs that fit on a SM."""
    products: dict[str, int]
    """Products of tiles by the instruction that does them."""
    bulk_loads: tuple[str, ...]
    """Arguments that TMA brings."""
    bulk_stores: int
    async_copies: int
    serialized: bool
    """Whether ptxas makes every wgmma wait for the one before."""


def compiled(variant: Variant) -> Report:
    """Compile `variant`, whatever is cached, and return what came out.

    Pointers are aligned to 16 bytes; of the integers nothing is known but what the kernel says.
    """
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    # Less to compile, and the same instructions.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(variant.kernel.arg_names)
    types = {name: "constexpr" if name in variant.constants else variant.types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        made = triton.compile(
            ASTSource(variant.kernel, types, constants, aligned),
            target=GPUTarget("cuda", variant.arch, 32),
            options=variant.options,
        )
    return _report(variant, made, log.getvalue())


def _report(variant: Variant, made: Any, log: str) -> Report:
    registers = int(_found(r"Used (\d+) registers", log))
    stack, stores, loads = map(
        int, re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)[0]
    )
    tensor_memory = int(getattr(made.metadata, "tmem_size", 0) or 0)
    fits = [
        REGISTERS // (-(-registers // 8) * 8 * 32 * variant.options["num_warps"]),
        SHARED_MEMORY[variant.arch] // (made.metadata.shared + 1024),
        WARPS // variant.options["num_warps"],
        TENSOR_MEMORY_COLUMNS // tensor_memory if tensor_memory else WARPS,
    ]
    code = made.asm["ttgir"]
    dots = re.findall(r"tt\.dot .*-> tensor<[^>]*#(\w+)", code)
    return Report(
        registers=registers,
        stack=stack,
        spilled=stores + loads,
        shared=made.metadata.shared,
        tensor_memory=tensor_memory,
        occupancy=min(fits),
        products={
            "wgmma": code.count("ttng.warp_group_dot "),
            "tcgen05": code.count("ttng.tc_gen5_mma "),
            "mma.sync": sum(layout.startswith("mma") for layout in dots),
            "fma": sum(not layout.startswith("mma") for layout in dots),
        },
        bulk_loads=tuple(sorted(set(re.findall(r"async_tma_copy_global_to_local %(\w+?)(?:_\d+)?\[", code)))),
        bulk_stores=len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.global\.shared", made.asm["ptx"])),
        async_copies=made.asm["ptx"].count("cp.async.c"),
        serialized="wgmma.mma_async instructions are serialized" in log,
    )


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"ptxas did not say {pattern!r}: {text!r}")
    return match[1]


def mismatches(variant: Variant, report: Report, limit: int) -> list[str]:
    """Return what is wrong with a kernel that should run at speed; `limit` is in bytes of shared memory per program."""
    found = []
    if report.stack or report.spilled:
        found.append(f"{report.stack} bytes of stack and {report.spilled} bytes spilled")
    if report.shared > limit:
        found.append(f"{report.shared} bytes of shared memory; sm_{variant.arch} has {limit}")
    if report.tensor_memory > TENSOR_MEMORY_COLUMNS:
        found.append(f"{report.tensor_memory} columns of tensor memory; there are {TENSOR_MEMORY_COLUMNS}")
    if report.serialized:
        found.append("ptxas serializes its wgmma instructions")
    if report.occupancy < variant.programs:
        found.append(f"{variant.programs} programs are meant to share an SM; {report.occupancy} fit")
    by = {name for name, count in report.products.items() if count}
    if not by <= variant.products or (variant.products and not by):
        found.append(f"products by {report.products}; expected {' or '.join(sorted(variant.products))} alone")
    if variant.products and not variant.described and not report.async_copies:
        found.append("its loop does not load by asynchronous copies")
    missing = variant.described - {"out"} - set(report.bulk_loads)
    if missing:
        found.append(f"TMA does not bring {', '.join(sorted(missing))}")
    if "out" in variant.described and not report.bulk_stores:
        found.append("TMA does not take its results away")
    return found
