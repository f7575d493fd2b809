"""Markdown tables of result files. Every number in them is a measure of a row, or a ratio of two."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import bars
from benchmarks.record import median

NOT_MEASURED = "not measured"
COMPULSORY = (
    '* "Compulsory MB" is a formula, the same for all (`counting.Compulsory`): parameters and inputs; in training also '
    "what autograd keeps for the backward, gradients, and the optimizer's state. It is no measured traffic."
)
Row = dict[str, Any]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def seconds(value: float | None) -> str:
    """A time in the unit that suits it, three digits."""
    if value is None:
        return "-"
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= unit or name == "µs":
            return f"{value / unit:.3g} {name}" if value / unit < 1000 else f"{value / unit:.0f} {name}"
    raise AssertionError


def headline(row: Row) -> str:
    """The main measure of a row in a few words, or why there is none."""
    for state in ("skipped", "failed", "refused"):
        if state in row:
            return f"{state}: {row[state]}"
    parts = [
        f"{label}{seconds(median(row[kind]))}"
        for kind, label in (
            ("seconds", ""), ("device_seconds", "device "),
            ("forward", "forward "), ("forward_backward", "with backward "),
        )
        if kind in row
    ]  # fmt: skip
    parts += [f"{row[kind]:,.1f} MiB" for kind in ("peak_memory_mib", "added_memory_mib") if kind in row]
    return ", ".join(parts) or NOT_MEASURED


def points(result: dict[str, Any]) -> dict[str, list[Row]]:
    """Rows by point, in the order of the file."""
    found: dict[str, list[Row]] = {}
    for row in result["rows"]:
        found.setdefault(json.dumps(row["point"]), []).append(row)
    return found


def of(rows: Sequence[Row], contender: str, measure: str) -> float | None:
    """A measure of a contender among the rows of one point."""
    return next((median(row.get(measure)) for row in rows if row["contender"] == contender), None)


def ratio(value: float | None, base: float | None) -> str:
    """`value / base`, or a dash."""
    return f"{value / base:.2f}" if value is not None and base else "-"


def _number(row: Row, measure: str, format: str, unit: float = 1.0) -> str:
    value = median(row.get(measure))
    return "-" if value is None else f"{value / unit:{format}}"


Cells = Callable[[Row, Sequence[Row]], list[str]]


def _linear(row: Row, rows: Sequence[Row]) -> list[str]:
    return [
        seconds(median(row.get("forward"))),
        seconds(median(row.get("forward_backward"))),
        ratio(median(row.get("forward_backward")), of(rows, "frozen F.linear", "forward_backward")),
        _number(row, "flops", ".2f", 1e9),
        _number(row, "bytes", ".1f", 1e6),
        _number(row, "percent_of_gemm", ".0f"),
        _number(row, "percent_of_copy", ".0f"),
    ]


def _scaling(row: Row, rows: Sequence[Row]) -> list[str]:
    return [
        seconds(median(row.get("forward_backward"))),
        ratio(median(row.get("forward_backward")), of(rows, "frozen F.linear", "forward_backward")),
        seconds(row.get("predicted")),
        f"{row['deviation']:+.1%}" if "deviation" in row else "-",
    ]


def _step(row: Row, rows: Sequence[Row]) -> list[str]:
    rate = next((key for key in row if key.endswith("_per_second")), "")
    return [
        seconds(median(row.get("seconds"))),
        ratio(median(row.get("seconds")), of(rows, "PEFT, all", "seconds")),
        ratio(median(row.get("seconds")), of(rows, "frozen, dx everywhere", "seconds")),
        f"{row[rate]:,.0f} {rate.removesuffix('_per_second')}" if rate else "-",
        _number(row, "peak_memory_mib", ",.0f"),
        *_of_model(row),
    ]


def _of_model(row: Row) -> list[str]:
    return [
        _number(row, "flops", ",.4g", 1e9),
        _number(row, "percent_of_gemm", ".0f"),
        _number(row, "compulsory_bytes", ",.0f", 1e6),
        _number(row, "percent_of_copy", ".0f"),
    ]


def _memory(row: Row, rows: Sequence[Row]) -> list[str]:
    return [
        _number(row, "peak_memory_mib", ",.0f"),
        ratio(row.get("peak_memory_mib"), of(rows, "PEFT, all", "peak_memory_mib")),
    ]


def _inference(row: Row, rows: Sequence[Row]) -> list[str]:
    return [
        seconds(median(row.get("seconds"))),
        ratio(median(row.get("seconds")), of(rows, "base", "seconds")),
        *_of_model(row),
    ]


def _merge(row: Row, rows: Sequence[Row]) -> list[str]:
    kind = "device_seconds" if "device_seconds" in row else "seconds"
    return [
        seconds(median(row.get("seconds"))),
        seconds(median(row.get("device_seconds"))),
        ratio(median(row.get(kind)), of(rows, "copy", kind)),
        ratio(median(row.get("seconds")), of(rows, "PEFT merge_and_unload", "seconds")),
        _number(row, "added_memory_mib", ",.1f"),
        _number(row, "flops", ".2f", 1e9),
        _number(row, "bytes", ",.0f", 1e6),
        _number(row, "percent_of_gemm", ".0f"),
        _number(row, "percent_of_copy", ".0f"),
    ]


_MODEL_HEADS = ["GFLOP", "% GEMM", "compulsory MB", "% copy"]
_STEP_HEADS = ["step", "over PEFT, all", "over frozen, dx", "per second", "peak MiB", *_MODEL_HEADS]
COLUMNS: dict[str, tuple[list[str], Cells]] = {
    "linear": (["forward", "with backward", "over frozen", "GFLOP", "MB", "% GEMM", "% copy"], _linear),
    "scaling": (["with backward", "over frozen", "predicted", "deviation"], _scaling),
    "train_step": (_STEP_HEADS, _step),
    "gates": (_STEP_HEADS, _step),
    "train_memory": (["peak MiB", "over PEFT, all"], _memory),
    "inference": (["forward", "over base", *_MODEL_HEADS], _inference),
    "merge": (["call", "device", "over copy", "over PEFT", "added MiB", "GFLOP", "MB", "% GEMM", "% copy"], _merge),
}


def case_table(result: dict[str, Any]) -> str:
    """All points of a case: one row per contender that was measured, then what was not, with the reason."""
    heads, cells = COLUMNS[result["case"]]
    body: list[list[str]] = []
    left_out: dict[str, list[str]] = {}
    for rows in points(result).values():
        spelled = ", ".join(f"{key} {value}" for key, value in rows[0]["point"].items())
        for row in rows:
            state = next((state for state in ("skipped", "failed", "refused") if state in row), None)
            if state is None:
                body.append([spelled, row["contender"], *cells(row, rows)])
            else:
                left_out.setdefault(f"{row['contender']}: {state}: {row[state]}", []).append(spelled)
            if "not_counted" in row:
                left_out.setdefault(f"{row['contender']}: not counted: {row['not_counted']}", []).append(spelled)
        reason = next((row["input_reason"] for row in rows if "input_reason" in row), None)
        if reason:
            left_out.setdefault(f"inputs are not rotated past the cache: {reason}", []).append(spelled)
    # A column that nobody fills says nothing.
    used = [i for i in range(2 + len(heads)) if i < 2 or any(row[i] != "-" for row in body)]
    text = table([["point", "", *heads][i] for i in used], [[row[i] for i in used] for row in body])
    notes = [COMPULSORY] * any("compulsory_bytes" in row for row in result["rows"])
    notes += [f"* {reason} ({len(where)} of {len(points(result))} points)" for reason, where in left_out.items()]
    return "\n\n".join([text] + (["\n".join(notes)] if notes else []))


def origin(result: dict[str, Any]) -> str:
    """Device, commit, versions and date of a result file in one sentence."""
    environment, packages = result["environment"], result["environment"]["packages"]
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    commit = (environment["commit"] or "unknown")[:10] + (" with changes" if environment["dirty"] else "")
    text = f"{environment['device']}; {versions}; commit {commit}; {environment['date'][:10]}."
    limits = result.get("ceilings")
    if limits:
        rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in limits["gemm_flops_per_s"].items())
        text += f" Ceilings in this run: {rates}; copy {limits['copy_bytes_per_s'] / 1e9:,.1f} GB/s read and written."
    return text if result.get("complete", True) else text + " **Incomplete: the time was up before the grid was.**"


def proof_tables(proof: dict[str, Any]) -> list[str]:
    """How each part of the proof on a GPU ended, and what the profiler said of the kernels."""
    rows = []
    for name, part in proof["parts"].items():
        counts = part.get("counts") or {check: run["state"] for check, run in part.get("runs", {}).items()}
        note = ", ".join(f"{what}: {number}" for what, number in counts.items()) or part.get("reason", "")
        rows.append([name, part["state"], f"{part['seconds']:.0f}", note])
    found = [origin(proof), table(["part", "state", "seconds", ""], rows)]
    kernels = proof["parts"].get("profile", {}).get("kernels", [])
    if kernels:
        heads = list(dict.fromkeys(key for kernel in kernels for key in kernel))
        found.append(table(heads, [[f"`{k[h]}`" if h == "kernel" else k.get(h, "-") for h in heads] for k in kernels]))
    return found


def bars_table(devices: Sequence[str], results: Path) -> str:
    """Every bar of these devices: what was measured under `results`, the limit, and whether it is met."""
    rows = []
    for bar, found in bars.judged(results=results):
        if any(bars.is_device(device, bar.device) for device in devices):
            shown = NOT_MEASURED if found.number is None else f"{found.number:.3f}"
            rows.append(
                [
                    bar.label,
                    bar.device,
                    shown,
                    f"{bars.SIGNS[bar.asks][1]} {bar.limit:g}",
                    ", ".join([*[bars.verdict(bar, found)] * (found.number is not None), *found.notes]),
                ]
            )
    return table(["bar", "device", "measured", "limit", ""], rows)


def train_step_table(step: dict[str, Any], memory: dict[str, Any] | None) -> str:
    """One row per contender: seconds (and their ratio to PEFT on all layers) and peak memory at each precision."""
    by_precision: dict[str, list[Row]] = {}
    for row in step["rows"]:
        if row["point"]["mode"] == "eager" and "seconds" in row:
            by_precision.setdefault(row["point"]["precision"], []).append(row)
    peaks = {(row["point"]["precision"], row["contender"]): row for row in memory["rows"]} if memory else {}
    rows = []
    for name in dict.fromkeys(row["contender"] for rows in by_precision.values() for row in rows):
        cells = [name]
        for precision_rows in by_precision.values():
            value = of(precision_rows, name, "seconds")
            share = ratio(value, of(precision_rows, "PEFT, all", "seconds"))
            cells.append(NOT_MEASURED if value is None else f"{value:.2f} s ({share})")
        for precision in by_precision:
            peak = peaks.get((precision, name), {}).get("peak_memory_mib")
            cells.append(NOT_MEASURED if peak is None else f"{peak:,.0f} MiB")
        rows.append(cells)
    environment, point = step["environment"], step["rows"][0]["point"]
    packages = environment["packages"]
    note = (
        f"One training step of {point['model']}, batch {point['batch']}, r = {point['r']}; in parentheses the "
        f"ratio to PEFT {packages['peft']} on all layers, in the same process. {environment['device']}, "
        f"torch {packages['torch']}. Peak memory is that of a process of its own, libraries included. "
        "'Few' is the attention and MLP output projections of the last two layers; 'frozen, dx everywhere' is the "
        "limit that no low-rank update on all layers can pass."
    )
    heads = ["", *by_precision, *(f"{precision}, peak" for precision in by_precision)]
    # A column of memory that nobody measured says nothing.
    used = [i for i in range(len(heads)) if i <= len(by_precision) or any(row[i] != NOT_MEASURED for row in rows)]
    return note + "\n\n" + table([heads[i] for i in used], [[row[i] for i in used] for row in rows])
