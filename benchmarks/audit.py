"""What the kernels are, without a GPU: `python -m benchmarks.audit` writes results/audit/linear_kernels.{json,md}.

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
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from benchmarks.ceilings import Ceilings, on_record
from benchmarks.compiled import Report, Variant, compiled, faults
from benchmarks.narrow_variants import narrow_variants
from benchmarks.record import RESULTS, environment, read_result, source, write_result
from benchmarks.report.tables import table
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


# What became of one variant: a `Report` with its faults.
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
    entries, there = [], {(entry["kernel"], entry["label"]): entry for entry in known}
    for variant in variants_of(part):
        entry = there.get((variant.kernel.fn.__name__, variant.label))
        if entry is not None:
            entries.append(entry)
            continue
        report = compiled(variant)
        wrong = faults(variant, report, configs.SHARED_MEMORY[part])
        entry = {name: value for name, value in dataclasses.asdict(report).items() if name != "seconds"}
        entries.append({**entry, "faults": wrong})
        print(f"sm_{part} {variant.kernel.fn.__name__} {variant.label}: {_resources(report)} {wrong or ''}", flush=True)
    return entries


def _resources(report: Report) -> str:
    return f"{report.registers} registers, {report.shared} bytes shared, {report.occupancy} programs"


def text(payload: dict[str, Any]) -> str:
    """The Markdown rendering."""
    shapes = [
        [
            f"{shape['K']} → {shape['N']}",
            *(f"{sum(work[key] for work in shape['counted'].values()) / unit:.2f}" for key, unit in _COUNTS),
            f"{shape['counted_frozen']['flops'] / 1e12:.2f}",
            f"{shape['counted_frozen']['bytes'] / 1e9:.2f}",
            *(f"{1e6 * seconds:.0f}" for seconds in shape["predicted_seconds"].values()),
            f"{1e6 * shape['predicted_frozen_seconds']:.0f}",
            f"{shape['predicted_over_frozen']:.2f}",
            "-" if shape["bar_over_frozen"] is None else f"{shape['bar_over_frozen']:.2f}",
            shape["measured"],
        ]
        for shape in payload["shapes"]
    ]
    kernels: list[list[str]] = []
    others: list[list[str]] = []
    for entry in payload["kernels"]:
        gemm = entry["kernel"].startswith("linear_")
        cells = [f"sm_{entry['part']}", entry["kernel"].removeprefix("linear_").strip("_").replace("_", " ")]
        cells += _case(entry["kernel"], entry["label"]) if gemm else _narrow_case(entry["label"])
        cells += _compiled(entry)
        (kernels if gemm else others).append(cells)
    packages = payload["environment"]["packages"]
    tera = {name: payload["ceilings"][name] / 1e12 for name in ("flops_per_s", "bytes_per_s")}
    return f"""# The kernels, without a GPU

Written by `python -m benchmarks.audit` with Triton {packages["triton"]}, torch {packages["torch"]}; \
{source(payload["environment"])}. No kernel was run for it: the first table is counted and predicted, the others are \
what the compiler made.

## Counted and predicted

bf16, M = {payload["M"]}, r = {payload["r"]}, all active, one block, on an H200 at {tera["flops_per_s"]:.0f} TFLOP/s
and {tera["bytes_per_s"]:.1f} TB/s ({payload["ceilings"]["source"]}). FLOPs are those executed, with S and T once per
tile. A kernel is predicted to take the larger of its two quotients; loads, stores and products overlap less than that
in truth. "Over frozen" is forward, input gradient and weight gradients over forward and input gradient of a frozen
layer, predicted in the same way; the bar is for the same quotient, measured. {_beyond(payload["shapes"])}

{table(_SHAPE_HEADS, shapes)}

## Compiled

Every configuration of `kernels/configs.py`, in the most demanding case that it serves: fp32 A and B, a bias, any rank
that "r" allows and any K and N that "access" allows; where "access" is aligned, once more for sizes that are all
multiples of 16, for which Triton makes other code. "Fit" is how many programs of how many warps fit on a
multiprocessor; products are those of tiles, by the instruction that does them; the copy engine brings the operands
named last.

{table(_KERNEL_HEADS, kernels)}

## Compiled, the kernels beside the two

Every configuration of `kernels/narrow_configs.py`: the pass over x and dy for dA, dB and the gates (`partial sums`) and
its reduction, S and T by themselves, the gate probe. "Columns" are those of S or T that a program holds.

{table(_NARROW_HEADS, others)}
"""


def _beyond(shapes: Sequence[dict[str, Any]]) -> str:
    """Which bars lie below what is predicted."""
    bars = [shape for shape in shapes if shape["bar_over_frozen"] is not None]
    names = [f"{s['K']} → {s['N']}" for s in bars if s["predicted_over_frozen"] > s["bar_over_frozen"]]
    return (
        f"{len(names)} of {len(bars)} bars lie below what is predicted: those of {', '.join(names)}." if names else ""
    )


_COUNTS = (("flops", 1e12), ("bytes", 1e9), ("l2_bytes", 1e9))
_SHAPE_HEADS = [
    "layer", "TFLOP", "GB", "GB from L2", "frozen TFLOP", "frozen GB", "forward µs, predicted", "dx µs, predicted",
    "dA, dB µs, predicted", "frozen µs, predicted", "over frozen, predicted", "bar", "over frozen, measured",
]  # fmt: skip
_COMPILED_HEADS = ["registers", "stack and spills, bytes", "shared, KiB", "fit", "products", "bulk copies"]
_KERNEL_HEADS = ["GPU", "kernel", "access", "numbers", "form", "R", "r", "tile", "blocks", *_COMPILED_HEADS]
_NARROW_HEADS = ["GPU", "kernel", "case", "columns", "tile", *_COMPILED_HEADS]


def _compiled(entry: dict[str, Any]) -> list[str]:
    return [
        str(entry["registers"]),
        str(entry["stack"] + entry["spilled"]),
        f"{entry['shared'] / 1024:.0f}",
        f"{entry['occupancy']} x {entry['warps']}",
        " ".join(f"{count} {name}" for name, count in entry["products"].items() if count),
        ", ".join(entry["bulk_loads"]) or "-",
    ]


def _narrow_case(label: str) -> list[str]:
    """The label of a variant beside the GEMMs as cells: what it is, columns, tile."""
    head, _, tile = label.partition(" Rows(" if " Rows(" in label else " Columns(")
    words = head.rstrip(",").split(", ")
    if not tile:
        return [head, "-", "-"]
    values = dict(field.split("=") for field in tile.rstrip(")").split(", "))
    rows, columns = ("ROWS", "TILE") if "TILE" in values else ("BM", "BK")
    return [", ".join(words[:-1]), words[-1], f"{values[rows]}x{values[columns]}, {values['num_stages']} stages"]


def _case(kernel: str, label: str) -> list[str]:
    """The label of a variant as cells."""
    head, rest = label.split(", R=")
    R, rest = rest.split(", Gemm(")
    R, ranks = R.split(", ")
    fields, blocks = rest.split("), ")
    values = dict(field.split("=") for field in fields.split(", "))
    access, numbers, form = head.split(", ", 2)
    tile = f"{values['BM']}x{values['BN']}x{values['BK']}, {values['num_stages']} stages"
    # The loops that read S or T, and those of the input gradient over several blocks, end with each tile.
    one_pipeline = not form.startswith("given") and (kernel == "linear_forward" or blocks == "one block")
    flags = ["halves"] * (values["HALVES"] == "True") + ["flat"] * (values["FLATTEN"] == "True" and one_pipeline)
    return [access, numbers, form, R, ranks, ", ".join([tile, *flags]), blocks.split()[0]]


def main() -> None:
    """Compile, count, and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, nargs="+", choices=configs.PARTS, default=configs.PARTS)
    parser.add_argument(
        "--missing", action="store_true",
        help="compile only what the file lacks, which is enough where nothing but configurations has changed",
    )  # fmt: skip
    arguments = parser.parse_args()
    limits = on_record()
    path = RESULTS / "audit" / f"{CASE}.json"
    known = read_result(path)["kernels"] if arguments.missing and path.exists() else []
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


if __name__ == "__main__":
    main()
