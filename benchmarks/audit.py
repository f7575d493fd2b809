"""What the compiler makes of the kernels, without a GPU: `python -m benchmarks.audit` writes results/audit/kernels.csv.

Every candidate of `kernels/configs.py` is compiled for sm_80, sm_90 and sm_100 (about a quarter of an hour on a core).
What a row says is under `COLUMNS`; a kernel that spills, does not fit into shared memory, uses other instructions than
the arch's own or loses its pipeline is an error. No kernel is run, so nothing here is a time. Compiling needs functions
that are not Triton's interpreter's: under TRITON_INTERPRET it has to be done in another process.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import hashlib
import io
import os
import re
import sys
from typing import NamedTuple

from benchmarks.compile_cases import CompileCase, compile_cases
from benchmarks.results import RESULTS, ROOT
from slora.io.atomic import write_text
from slora.kernels import configs

KERNELS = ROOT / "kernels"
PATH = RESULTS / "audit" / "kernels.csv"
COLUMNS = ("arch", "kernel", "case", "registers", "shared KiB", "programs per SM", "products", "TMA")
"""Registers per thread, shared memory per program, programs that fit on an SM, products of tiles by the instruction
that does them, operands that TMA brings."""
# Per SM: registers, warps, columns of tensor memory, and bytes of shared memory, of which a program needs 1 KiB more
# than it asks for.
REGISTERS, WARPS, TENSOR_MEMORY = 65536, 64, 512
SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}


class Report(NamedTuple):
    """What became of a case: `spilled` bytes per thread and of stack, `shared` bytes per program, programs that fit on
    an SM, products of tiles by instruction, arguments that TMA `loads`, whether it `stores` results, whether there are
    other asynchronous `copies`, whether wgmma instructions of two steps of a loop are `overlapped`, and whether ptxas
    makes every wgmma wait for the one before.
    """

    registers: int
    spilled: int
    shared: int
    occupancy: int
    products: dict[str, int]
    loads: tuple[str, ...]
    stores: bool
    copies: bool
    overlapped: bool
    serialized: bool


def compile_kernel(case: CompileCase) -> Report:
    """Compile `case`, whatever is cached. Of its integers nothing is known; its pointers are aligned to 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

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
        # What is no argument is one of two, as the step of the loop says.
        loads=tuple(
            sorted(
                {
                    name if name in names else "..."
                    for name in re.findall(r"async_tma_copy_global_to_local %(\w+?)(?:_\d+)?(?:#\d+)?\[", code)
                }
            )
        ),
        stores=bool(re.search(r"cp\.async\.bulk\.tensor\.\dd\.global\.shared", ptx)),
        copies="cp.async.c" in ptx,
        overlapped=bool(re.search(r"warp_group_dot_wait .*pendings = [1-9]", code)),
        serialized="wgmma.mma_async instructions are serialized" in said,
    )


def mismatches(case: CompileCase, report: Report) -> list[str]:
    """What is wrong with a kernel that should run at speed."""
    used = {name for name, count in report.products.items() if count}
    described = {name for name, kind in case.types.items() if kind.startswith("tensordesc")}
    missing = [] if "..." in report.loads else sorted(described - {"out", *report.loads})
    limit = configs.SHARED_MEMORY[case.arch]
    found = {
        f"{report.spilled} bytes of stack and spills": report.spilled,
        f"{report.shared} bytes of shared memory; sm_{case.arch} has {limit}": report.shared > limit,
        f"{case.programs} programs are meant to share an SM; {report.occupancy} fit": report.occupancy < case.programs,
        "ptxas serializes its wgmma instructions": report.serialized,
        "every step of its loop waits for its own wgmma":
            case.arch == 90 and "out" in described and not report.overlapped,
        f"products by {report.products}; expected {' or '.join(sorted(case.products))} alone":
            not used <= case.products or (case.products and not used),
        "its loop does not load by asynchronous copies": case.products and not described and not report.copies,
        f"TMA does not bring {', '.join(missing)}": missing,
        "TMA does not take its results away": "out" in described and not report.stores,
    }  # fmt: skip
    return [text for text, wrong in found.items() if wrong]


def source_hash() -> str:
    """Return a hash of the code of the kernels and their tile sizes: comments and docstrings do not count."""
    digest = hashlib.sha256()
    for path in sorted(KERNELS.glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:16]


def committed() -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return the head of the file, by name, and its rows."""
    head, _, table = PATH.read_text().partition("\n")
    return dict(word.split("=") for word in head.removeprefix("# ").split()), list(csv.DictReader(io.StringIO(table)))


def name(case: CompileCase) -> tuple[str, str, str]:
    """Return what identifies a case: the first three of `COLUMNS`."""
    return f"sm_{case.arch}", case.kernel.__name__, case.label


def main() -> int:
    """Compile everything and write the file, unless a kernel is not as it should be."""
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="compile what has one of these in its row, and write nothing")
    only = parser.parse_args().only
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("under TRITON_INTERPRET nothing is compiled; unset it")
    correct, rows = True, list[tuple[object, ...]]([COLUMNS])
    for case in (case for arch in configs.ARCHS for case in compile_cases(arch)):
        if not only or any(text in ", ".join(name(case)) for text in only):
            report = compile_kernel(case)
            wrong = mismatches(case, report)
            correct &= not wrong
            products = " ".join(f"{count} {kind}" for kind, count in report.products.items() if count)
            found = report.registers, report.shared // 1024, report.occupancy, products, " ".join(report.loads)
            rows.append((*name(case), *found))
            print(*rows[-1], *wrong, sep=", ", flush=True)
    if correct and not only:
        text = io.StringIO()
        text.write(f"# source={source_hash()} triton={triton.__version__}\n")
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_text(PATH, text.getvalue())
        print(PATH)
    return int(not correct)


if __name__ == "__main__":
    sys.exit(main())
