"""What the compiler makes of a kernel, without a GPU: registers, spills, shared memory, instructions.

Compiling needs functions that are not Triton's interpreter's: whoever runs under TRITON_INTERPRET, as the tests do, has
to do it in another process.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Per SM: registers, warps, columns of tensor memory, and bytes of shared memory, of which a program needs 1 KiB more
# than it asks for.
REGISTERS, WARPS, TENSOR_MEMORY = 65536, 64, 512
SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
# What does products of tiles at full speed.
OWN = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


@dataclass(frozen=True)
class CompileCase:
    """A kernel with the types and compile-time values of one call.

    Attributes:
        kernel: a function under `triton.jit`.
        arch: 80, 90 or 100.
        label: what it is, for people: unique for a kernel and arch.
        types: of each argument that is no constant, as Triton writes it.
        options: num_warps, num_stages and the like.
        products: the instructions that may do its products of tiles.
        programs: how many programs are meant to share an SM.
    """

    kernel: Any
    arch: int
    label: str
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    products: frozenset[str]
    programs: int = 1


@dataclass(frozen=True)
class Report:
    """What became of a case.

    Attributes:
        spilled: bytes per thread, and of stack.
        shared: bytes per program.
        occupancy: programs that fit on an SM.
        products: products of tiles by the instruction that does them.
        loads: arguments that TMA brings.
        stores: whether TMA takes results away.
        copies: whether there are other asynchronous copies.
        serialized: whether ptxas makes every wgmma wait for the one before.
    """

    registers: int
    spilled: int
    shared: int
    occupancy: int
    products: dict[str, int]
    loads: tuple[str, ...]
    stores: bool
    copies: bool
    serialized: bool


def compile_kernel(case: CompileCase) -> Report:
    """Compile `case`, whatever is cached, and return what came out.

    Pointers are aligned to 16 bytes; of the integers nothing is known but what the kernel says.
    """
    # Without line numbers there is less to compile, and the instructions are the same.
    os.environ.update(
        dict.fromkeys(("TRITON_ALWAYS_COMPILE", "TRITON_DUMP_PTXAS_LOG", "TRITON_DISABLE_LINE_INFO"), "1")
    )
    names, log = list(case.kernel.arg_names), io.StringIO()
    types = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(case.kernel, types, constants, aligned)
    with contextlib.redirect_stdout(log):
        made = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=case.options)
    said, code, ptx = log.getvalue(), made.asm["ttgir"], made.asm["ptx"]
    registers = int(re.findall(r"Used (\d+) registers", said)[0])
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)[0]
    warps, tensor_memory = case.options["num_warps"], int(getattr(made.metadata, "tmem_size", 0) or 0)
    dots = re.findall(r"tt\.dot .*-> tensor<[^>]*#(\w+)", code)
    return Report(
        registers=registers,
        spilled=sum(map(int, spills)),
        shared=made.metadata.shared,
        occupancy=min(
            REGISTERS // (-(-registers // 8) * 8 * 32 * warps),
            SHARED_MEMORY[case.arch] // (made.metadata.shared + 1024),
            WARPS // warps,
            TENSOR_MEMORY // max(1, tensor_memory),
        ),
        products={
            "wgmma": code.count("ttng.warp_group_dot "),
            "tcgen05": code.count("ttng.tc_gen5_mma "),
            "mma.sync": sum(layout.startswith("mma") for layout in dots),
            "fma": sum(not layout.startswith("mma") for layout in dots),
        },
        loads=tuple(sorted(set(re.findall(r"async_tma_copy_global_to_local %(\w+?)(?:_\d+)?\[", code)))),
        stores=bool(re.search(r"cp\.async\.bulk\.tensor\.\dd\.global\.shared", ptx)),
        copies="cp.async.c" in ptx,
        serialized="wgmma.mma_async instructions are serialized" in said,
    )


def mismatches(case: CompileCase, report: Report, limit: int) -> list[str]:
    """What is wrong with a kernel that should run at speed; `limit`: bytes of shared memory per program."""
    used = {name for name, count in report.products.items() if count}
    described = {name for name, kind in case.types.items() if kind.startswith("tensordesc")}
    missing = sorted(described - {"out", *report.loads})
    own = " or ".join(sorted(case.products))
    found = {
        f"{report.spilled} bytes of stack and spills": report.spilled,
        f"{report.shared} bytes of shared memory; sm_{case.arch} has {limit}": report.shared > limit,
        f"{case.programs} programs are meant to share an SM; {report.occupancy} fit":
            report.occupancy < case.programs,
        "ptxas serializes its wgmma instructions": report.serialized,
        f"products by {report.products}; expected {own} alone":
            not used <= case.products or (case.products and not used),
        "its loop does not load by asynchronous copies": case.products and not described and not report.copies,
        f"TMA does not bring {', '.join(missing)}": missing,
        "TMA does not take its results away": "out" in described and not report.stores,
    }  # fmt: skip
    return [text for text, wrong in found.items() if wrong]
