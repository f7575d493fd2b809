"""What the kernels are, without a GPU: `python -m benchmarks.audit` writes results/audit/linear_kernels.{json,md}.

Compiled is what the file lacks: a variant that it has under the same digest (`digests.py`) would come out the same.

    compiled    registers, stack, shared memory, programs per multiprocessor and instructions of every configuration
                of every kernel, by compiling it for sm_80, sm_90 and sm_100
    counted     FLOPs and bytes of a layer's forward, input gradient and weight gradients, from the kernels' loops
    predicted   the larger of FLOPs over one ceiling and bytes over another, added over the kernels; the ceilings are
                those that `linear` measured on an H200 where results/nvidia-h200 has them, else as stated below

No kernel in these files was run, so no time in them is a measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import triton

from benchmarks.ceilings import Ceilings, on_record
from benchmarks.compiled import Variant, compiled, faults
from benchmarks.digests import chosen, digest
from benchmarks.narrow_variants import narrow_variants
from benchmarks.record import RESULTS, environment, read_result, write_result
from benchmarks.report.audit_page import text
from benchmarks.variants import gemm_variants
from slora.files import write_text
from slora.flops import linear_flops
from slora.kernels import configs

CASE = "linear_kernels"
GEMMS: tuple[configs.Kernel, ...] = ("forward", "backward")
M, RANK, ELEMENT = 50432, 16, 2
# (K, N) and the most that forward and all gradients may cost over frozen forward and dx.
SHAPES = {
    (768, 768): 1.30, (768, 2304): None, (768, 3072): 1.20, (3072, 768): 1.25, (1024, 4096): 1.15,
    (4096, 1024): 1.20, (1280, 5120): 1.12,
}  # fmt: skip


# Of the variants in the file, how many are compiled again to see whether it is right.
ONE_IN = 6
# A warp gets registers in units of so many per thread.
REGISTER_UNIT = 8
MEND = "`python -m benchmarks.audit` mends that"
ANEW = "`python -m benchmarks.audit --anew` writes it again"
# What became of one variant: a `Report` with its faults and its digest.
Entry = dict[str, Any]


class Work(NamedTuple):
    """FLOPs and bytes of one kernel."""

    flops: int
    """Executed: with the tiles' ragged edges, the padded rank, and S or T once per tile that needs it."""
    bytes: int
    """To and from device memory, everything read once and written once."""
    l2_bytes: int
    """Of x, dy, W, A and B into shared memory, tile by tile."""

    def seconds(self, limits: Ceilings) -> float:
        """Predicted: what the ceilings allow."""
        return max(self.flops / limits.flops_per_s, self.bytes / limits.bytes_per_s)


def gemm_work(rows: int, columns: int, depth: int, r: int, tile: configs.Gemm, R: int) -> Work:
    """Return what `linear_forward` does at x [rows, depth], y [rows, columns]; the input gradient is its mirror."""
    tiles = -(-rows // tile.BM) * -(-columns // tile.BN)
    steps = -(-depth // tile.BK) * tile.BK
    narrow = linear_flops(tile.BM, R, steps) + linear_flops(tile.BM, tile.BN, R) if r else 0
    return Work(
        flops=tiles * (linear_flops(tile.BM, tile.BN, steps) + narrow),
        bytes=ELEMENT * (rows * depth + columns * depth + rows * columns + r * (rows + depth + columns)),
        l2_bytes=ELEMENT * tiles * steps * (tile.BM + tile.BN + (R if r else 0)),
    )


def weight_gradients_work(K: int, N: int) -> Work:
    """Return what the pass over x and dy for dA and dB does."""
    size = ELEMENT * (M * (K + N) + 2 * M * RANK)
    return Work(linear_flops(M, RANK, K) + linear_flops(M, N, RANK), size, size)


def of_shape(K: int, N: int, bar: float | None, limits: Ceilings) -> dict[str, Any]:
    """Return the counts and the prediction of one layer on an H200, beside a frozen layer with the same tiles."""
    forward = configs.gemm("forward", 90, "bulk", "16-bit", RANK, N)
    backward = configs.gemm("backward", 90, "bulk", "16-bit", RANK, K)
    parts = {
        "forward": gemm_work(M, N, K, RANK, forward.candidates[0], forward.R),
        "input gradient": gemm_work(M, K, N, RANK, backward.candidates[0], backward.R),
        "weight gradients": weight_gradients_work(K, N),
    }
    frozen = gemm_work(M, N, K, 0, forward.candidates[0], 0), gemm_work(M, K, N, 0, backward.candidates[0], 0)
    frozen_seconds = sum(work.seconds(limits) for work in frozen)
    seconds = {name: work.seconds(limits) for name, work in parts.items()}
    return {
        "K": K,
        "N": N,
        "counted": {name: work._asdict() for name, work in parts.items()},
        "counted_frozen": {"flops": sum(w.flops for w in frozen), "bytes": sum(w.bytes for w in frozen)},
        "predicted_seconds": seconds,
        "predicted_frozen_seconds": frozen_seconds,
        "predicted_over_frozen": sum(seconds.values()) / frozen_seconds,
        "bar_over_frozen": bar,
        "measured": "not measured",
    }


def compile_all(parts: Sequence[int], known: Sequence[Entry] = ()) -> list[Entry]:
    """Return one entry per variant, with what is wrong with it; compile, the kinds of GPU side by side, what is not
    `known`."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.map(_compile_part, parts, [[entry for entry in known if entry["part"] == part] for part in parts])
        return [entry for entries in found for entry in entries]


def variants_of(part: int) -> Iterator[Variant]:
    """Everything that is compiled for one kind of GPU."""
    return itertools.chain(*(gemm_variants(kernel, part) for kernel in GEMMS), narrow_variants(part))


def _compile_part(part: int, known: Sequence[Entry]) -> list[Entry]:
    entries, there = [], {entry.get("digest"): entry for entry in known}
    for variant in variants_of(part):
        entry = there.get(digest(variant))
        if entry is None:
            entry = compile_one(variant)
            print(f"{_name(entry)}: {_resources(entry)} {entry['faults'] or ''}", flush=True)
        entries.append(entry)
    return entries


def compile_one(variant: Variant) -> Entry:
    """Compile a variant; its entry is as JSON gives it back."""
    report = compiled(variant)
    values = {name: value for name, value in dataclasses.asdict(report).items() if name != "seconds"}
    wrong = faults(variant, report, configs.SHARED_MEMORY[variant.part])
    entry: Entry = json.loads(json.dumps({**values, "faults": wrong, "digest": digest(variant)}))
    return entry


def _resources(entry: Entry) -> str:
    return f"{entry['registers']} registers, {entry['shared']} bytes shared, {entry['occupancy']} programs"


def check(parts: Sequence[int]) -> list[str]:
    """Say what is wrong with the file or with the kernels, in a sentence each; write nothing.

    Compiled are the variants that the file lacks and, to see whether it is right, one in `ONE_IN` of those that it has.
    What another Triton makes of a kernel is looked at for faults only.
    """
    path = RESULTS / "audit" / f"{CASE}.json"
    record = read_result(path)
    same = record["environment"]["packages"]["triton"] == triton.__version__
    known = {entry["digest"]: entry for entry in record["kernels"]} if same else {}
    wrong, seen = [], set()
    for part in parts:
        for variant in variants_of(part):
            of = digest(variant)
            seen.add(of)
            there = known.get(of)
            fresh = compile_one(variant) if there is None or chosen(of, ONE_IN) else None
            wrong += complaints(there, fresh, same)
    # Of newer releases ptxas serializes the products of some input gradients; results on GPUs are made with this one.
    wrong = [line for line in wrong if same or "serializes" not in line]
    left = [entry for of, entry in known.items() if entry["part"] in parts and of not in seen]
    return wrong + [f"{_name(entry)}: in the file, but no variant any more; {MEND}" for entry in left]


def complaints(there: Entry | None, fresh: Entry | None, same: bool = True) -> list[str]:
    """What is wrong with one variant: as the file has it, as it was compiled now; either may be missing."""
    entry = fresh or there
    assert entry is not None
    found = [f"{_name(entry)}: {fault}" for fault in entry["faults"]]
    if there is None and same:
        found.append(f"{_name(entry)}: not in the file; {MEND}")
    if there is not None and fresh is not None:
        found += [
            f"{_name(entry)}: {key} is {fresh[key]}, the file says {there.get(key)}; {ANEW}"
            for key in fresh
            if not _alike(key, there.get(key), fresh[key])
        ]
    return found


def _alike(key: str, one: Any, other: Any) -> bool:
    """Whether a kernel that was compiled twice may say both: a few kernels take a register more or less each time.

    What that does to the programs that fit is a fault where more are meant to.
    """
    if key == "registers":
        return isinstance(one, int) and abs(one - other) <= REGISTER_UNIT
    return key == "occupancy" or one == other


def _name(entry: Entry) -> str:
    return f"sm_{entry['part']} {entry['kernel']} {entry['label']}"


def main() -> int:
    """Compile, count, and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, nargs="+", choices=configs.PARTS, default=configs.PARTS)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--anew", action="store_true", help="compile also what the file has already (10 to 20 minutes)")
    how.add_argument(
        "--check", action="store_true", help="write nothing; say whether the file is right, exit code 1 if not"
    )
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("under TRITON_INTERPRET nothing is compiled; unset it")
    if arguments.check:
        wrong = check(arguments.parts)
        print(*wrong, sep="\n", end="\n" * bool(wrong))
        return int(bool(wrong))
    limits = on_record()
    path = RESULTS / "audit" / f"{CASE}.json"
    known = read_result(path)["kernels"] if path.exists() and not arguments.anew else []
    payload = {
        "complete": set(arguments.parts) == set(configs.PARTS),
        "time": "not measured",
        "M": M,
        "r": RANK,
        "ceilings": limits._asdict(),
        "shapes": [of_shape(K, N, bar, limits) for (K, N), bar in SHAPES.items()],
        "kernels": compile_all(arguments.parts, known),
    }
    path = write_result(CASE, "audit", payload)
    written = path.with_suffix(".md")
    write_text(written, text({**payload, "environment": environment("cpu")}))
    print(path, written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
