"""Markdown tables of the cases. Every number in them is a measure of a row, or a ratio of two medians."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.results import NOT_MEASURED, TIMES, median, source

COMPULSORY = (
    '* "Compulsory MB" is a formula, the same for all (`counting.Compulsory`): parameters and inputs; in training also '
    "what autograd keeps for the backward, gradients, and the optimizer's state. It is no measured traffic."
)
# Of the update's predicted time; beyond, the model of costs says nothing about it.
FAR_OFF = 0.5
ONCE = (
    "* The ceilings were measured once, before the first point. On a machine that others share, a time that was taken "
    "in a better moment is more than 100% of them."
)
IN_PLACE = (
    '* A merge in place reads and writes one buffer, "copying once" reads one and writes another. On a CPU a copy is '
    'therefore no lower limit: "over copy" may be below 1, and "% copy", part of the ceiling of such a copy, over 100.'
)
# The key of a point that a curve of `scaling` runs along.
CURVES = {"active": "active", "rank": "r", "tokens": "M"}
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
Row = dict[str, Any]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def seconds(measure: Any) -> str:
    """A time in the unit that suits it, three digits; of a spread the median, with its percentiles in brackets."""
    value = median(measure)
    if value is None:
        return "-"
    unit, name = next(((unit, name) for unit, name in UNITS if value >= unit), UNITS[-1])
    ends = f" [{_digits(measure['p20'] / unit)}, {_digits(measure['p80'] / unit)}]" if isinstance(measure, dict) else ""
    return f"{_digits(value / unit)} {name}{ends}"


def _digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") if value < 999.5 else f"{value:.0f}"


def headline(row: Row) -> str:
    """The main measure of a row in a few words, or why there is none."""
    for state in ("skipped", "failed", "refused"):
        if state in row:
            return f"{state}: {row[state]}"
    parts = [
        f"{label}{seconds(row[kind])}"
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
        seconds(row.get("forward")),
        seconds(row.get("forward_backward")),
        ratio(median(row.get("forward_backward")), of(rows, "frozen F.linear", "forward_backward")),
        _number(row, "flops", ".2f", 1e9),
        _number(row, "bytes", ".1f", 1e6),
        _number(row, "percent_of_gemm", ".0f"),
        _number(row, "percent_of_copy", ".0f"),
    ]


def _scaling(row: Row, rows: Sequence[Row]) -> list[str]:
    return [
        seconds(row.get("forward_backward")),
        ratio(median(row.get("forward_backward")), of(rows, "frozen F.linear", "forward_backward")),
        seconds(row.get("predicted")),
        f"{row['deviation']:+.1%}" if "deviation" in row else "-",
        _update_deviation(row) if "update_deviation" in row else "-",
    ]


def _update_deviation(row: Row) -> str:
    """With its percentiles."""
    low, high = _percentiles_of_the_deviation(row)
    return f"{row['update_deviation']:+.0%} [{low:+.0%}, {high:+.0%}]"


def _percentiles_of_the_deviation(row: Row) -> tuple[float, float]:
    """The deviations that the 20th and the 80th percentile of the update's time give."""
    times, deviation = row["update_seconds"], row["update_deviation"]
    predicted = times["median"] / (1 + deviation)
    return times["p20"] / predicted - 1, times["p80"] / predicted - 1


def _where_the_model_fails(result: dict[str, Any]) -> list[str]:
    """At which points the update took far more or less time than the model of costs says."""
    rows = [row for row in result["rows"] if "update_deviation" in row]
    if not rows:
        return []
    ranges = [(row, *_percentiles_of_the_deviation(row)) for row in rows]
    off = [row for row, low, high in ranges if low > FAR_OFF or high < -FAR_OFF]
    text = (
        f"* The update's time is off by more than {FAR_OFF:.0%} of its prediction, percentiles and all, "
        f"at {len(off)} of {len(rows)} points"
    )
    named = [f"{_on_its_curve(row['point'])} ({row['contender']}, {_update_deviation(row)})" for row in off]
    return [f"{text}: {'; '.join(named)}. The model of costs does not hold there." if off else f"{text}."]


def _on_its_curve(point: dict[str, Any]) -> str:
    key = CURVES[point["curve"]]
    return f"curve {point['curve']}, {key} {point[key]}"


def _step(row: Row, rows: Sequence[Row]) -> list[str]:
    rate = next((key for key in row if key.endswith("_per_second")), "")
    return [
        seconds(row.get("seconds")),
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


def _host(row: Row, rows: Sequence[Row]) -> list[str]:
    peers = ("PEFT", "addmm function", "frozen nn.Linear")
    return [seconds(row.get("seconds")), *(ratio(median(row.get("seconds")), of(rows, p, "seconds")) for p in peers)]


def _memory(row: Row, rows: Sequence[Row]) -> list[str]:
    return [
        _number(row, "peak_memory_mib", ",.0f"),
        ratio(row.get("peak_memory_mib"), of(rows, "PEFT, all", "peak_memory_mib")),
    ]


def _inference(row: Row, rows: Sequence[Row]) -> list[str]:
    return [
        seconds(row.get("seconds")),
        ratio(median(row.get("seconds")), of(rows, "base", "seconds")),
        *_of_model(row),
    ]


def _merge(row: Row, rows: Sequence[Row]) -> list[str]:
    kind = "device_seconds" if "device_seconds" in row else "seconds"
    return [
        seconds(row.get("seconds")),
        seconds(row.get("device_seconds")),
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
    "scaling": (["with backward", "over frozen", "predicted", "deviation", "deviation of the update"], _scaling),
    "train_step": (_STEP_HEADS, _step),
    "gates": (_STEP_HEADS, _step),
    "host": (["time", "over PEFT", "over the addmm function", "over frozen"], _host),
    "train_memory": (["peak MiB", "over PEFT, all"], _memory),
    "inference": (["forward", "over base", *_MODEL_HEADS], _inference),
    "merge": (["call", "device", "over copy", "over PEFT", "added MiB", "GFLOP", "MB", "% GEMM", "% copy"], _merge),
}


def case_table(result: dict[str, Any]) -> str:
    """All points of a case: one row per contender that was measured, then what was not, with the reason."""
    heads, cells = COLUMNS[result["case"]]
    body: list[list[str]] = []
    left_out: dict[tuple[str, str], list[str]] = {}
    for rows in points(result).values():
        spelled = ", ".join(f"{key} {value}" for key, value in rows[0]["point"].items())
        for row in rows:
            state = next((state for state in ("skipped", "failed", "refused") if state in row), None)
            if state is None:
                body.append([spelled, row["contender"], *cells(row, rows)])
            else:
                left_out.setdefault((row["contender"], f"{state}: {row[state]}"), []).append(spelled)
            for before, what in (("", ""), ("forward_", ", forward")):
                if f"{before}not_captured" in row:
                    clock = f", clock {row[f'{before}clock']!r}" if f"{before}clock" in row else ""
                    note = f"launched call by call, not captured in a CUDA graph{clock}: {row[f'{before}not_captured']}"
                    left_out.setdefault((f"{row['contender']}{what}", note), []).append(spelled)
            if "not_counted" in row:
                left_out.setdefault((row["contender"], f"not counted: {row['not_counted']}"), []).append(spelled)
        reason = next((row["input_reason"] for row in rows if "input_reason" in row), None)
        if reason:
            left_out.setdefault(("inputs", f"not rotated past the cache: {reason}"), []).append(spelled)
    # A column that nobody fills says nothing.
    used = [i for i in range(2 + len(heads)) if i < 2 or any(row[i] != "-" for row in body)]
    text = table([["point", "", *heads][i] for i in used], [[row[i] for i in used] for row in body])
    notes = [COMPULSORY] * any("compulsory_bytes" in row for row in result["rows"])
    notes += [ONCE] * any(row.get("percent_of_gemm", 0) > 100 for row in result["rows"])
    notes += [IN_PLACE] * (result["case"] == "merge" and result.get("device") == "cpu")
    notes += _where_the_model_fails(result)
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (name, reason), where in left_out.items():
        alike.setdefault((reason, tuple(where)), []).append(name)
    notes += [
        f"* {'; '.join(names)}: {reason} ({len(where)} of {len(points(result))} points)"
        for (reason, where), names in alike.items()
    ]
    return "\n\n".join([text] + (["\n".join(notes)] if notes else []))


def origin(result: dict[str, Any]) -> str:
    """Device, commit, versions, date and repetitions of a result file in a few sentences."""
    environment, packages = result["environment"], result["environment"]["packages"]
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    text = f"{environment['device']}; {versions}; {source(environment)}; {environment['date'][:10]}."
    limits = result.get("ceilings")
    if limits:
        rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in limits["gemm_flops_per_s"].items())
        text += f" Ceilings in this run: {rates}; copy {limits['copy_bytes_per_s'] / 1e9:,.1f} GB/s read and written."
    text += repetitions(result.get("rows", ()))
    return text if result.get("complete", True) else text + " **Incomplete: the time was up before the grid was.**"


def repetitions(rows: Sequence[Row]) -> str:
    """What a time is in a table of `rows`, in one sentence with a blank before it."""
    counts = {row[kind]["n"] for row in rows for kind in TIMES & row.keys() if isinstance(row[kind], dict)}
    if not counts:
        return ""
    least, most = min(counts), max(counts)
    number = f"{most}" if least == most else f"{least} to {most}"
    return f" A time is the median of {number} repetitions, in brackets their 20th and 80th percentile."
