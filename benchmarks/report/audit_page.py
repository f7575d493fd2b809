"""The page of the static audit: what `benchmarks/audit.py` has counted and compiled, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.record import source
from benchmarks.report.tables import table


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
