"""What the compiler makes of the kernels, without a GPU: `python -m benchmarks.audit` writes results/audit/kernels.csv.

Every candidate of `kernels/configs.py` is compiled for sm_80, sm_90 and sm_100 (about a quarter of an hour on a core).
What a row says is under `COLUMNS`; a kernel that spills, does not fit into shared memory, uses other instructions than
the arch's own or loses its pipeline is an error. No kernel is run, so nothing here is a time.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import io
import os
import sys

from benchmarks.compile_kernel import CompileCase, Report, compile_kernel, mismatches
from benchmarks.results import RESULTS, ROOT
from slora.io.atomic import write_text

KERNELS = ROOT / "kernels"
PATH = RESULTS / "audit" / "kernels.csv"
COLUMNS = ("arch", "kernel", "case", "registers", "shared KiB", "programs per SM", "products", "TMA")
"""Registers per thread, shared memory per program, programs that fit on an SM, products of tiles by the instruction
that does them, operands that TMA brings."""


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


def row(case: CompileCase, report: Report) -> tuple[str, ...]:
    """Return the line of one case."""
    products = " ".join(f"{count} {kind}" for kind, count in report.products.items() if count)
    found = report.registers, report.shared // 1024, report.occupancy, products, " ".join(report.loads)
    return *name(case), *map(str, found)


def main() -> int:
    """Compile everything and write the file, unless a kernel is not as it should be."""
    import triton

    from benchmarks.compile_cases import compile_cases
    from slora.kernels import configs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="compile what has one of these in its row, and write nothing")
    only = parser.parse_args().only
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("under TRITON_INTERPRET nothing is compiled; unset it")
    correct, rows = True, list[tuple[str, ...]]([COLUMNS])
    for case in (case for arch in configs.ARCHS for case in compile_cases(arch)):
        if not only or any(text in ", ".join(name(case)) for text in only):
            report = compile_kernel(case)
            wrong = mismatches(case, report, configs.SHARED_MEMORY[case.arch])
            correct &= not wrong
            rows.append(row(case, report))
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
