"""Tables of several result files: the bars, the training step in the project's README, the parts of the proof.

A table is of one machine and names every commit that it has numbers of.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import bars
from benchmarks.record import NOT_MEASURED, source
from benchmarks.report.tables import Row, of, origin, ratio, repetitions, seconds, table


def proof_tables(proof: dict[str, Any]) -> list[str]:
    """How each part of the proof on a GPU ended, what it left out, and what the profiler said of the kernels."""
    rows = []
    for name, part in proof["parts"].items():
        counts = part.get("counts") or {check: run["state"] for check, run in part.get("runs", {}).items()}
        notes = [f"{what}: {number}" for what, number in counts.items()] or (
            [part["reason"]] if "reason" in part else []
        )
        notes += [f"left out: {what} ({reason})" for what, reason in part.get("left_out", {}).items()]
        rows.append([name, part["state"], f"{part['seconds']:.0f}", ", ".join(notes)])
    found = [origin(proof), table(["part", "state", "seconds", ""], rows)]
    kernels = proof["parts"].get("profile", {}).get("kernels", [])
    if kernels:
        heads = list(dict.fromkeys(key for kernel in kernels for key in kernel))
        found.append(table(heads, [[f"`{k[h]}`" if h == "kernel" else k.get(h, "-") for h in heads] for k in kernels]))
    return found


def bars_tables(devices: Sequence[str], results: Path) -> list[str]:
    """Every bar of these devices, by machine: what was measured under `results`, the limit, and whether it is met."""
    rows = [
        (bar, found)
        for bar, found in bars.judged(results=results)
        if any(bars.is_device(device, bar.device) for device in devices)
    ]
    found_tables = []
    for machine, group in bars.by_machine(rows).items():
        body = []
        for bar, found in group:
            verdict = [bars.verdict(bar, found)] if found.number is not None else []
            limit = f"{bars.SIGNS[bar.asks][1]} {bar.limit:g}"
            body.append([bar.label, found.text, limit, ", ".join([*verdict, *found.notes])])
        found_tables += [f"{machine}.", table(["bar", "measured", "limit", ""], body)]
    return found_tables


def memory_beside(step: dict[str, Any], memory: dict[str, Any] | None) -> dict[str, Any] | None:
    """The result file of the memory, where it is of the machine that the times are of."""
    same = memory is not None and memory["environment"]["device"] == step["environment"]["device"]
    return memory if same else None


def train_step_table(step: dict[str, Any], memory: dict[str, Any] | None) -> str:
    """One row per contender: seconds (and their ratio to PEFT on all layers) and peak memory at each precision."""
    beside = memory_beside(step, memory)
    by_precision: dict[str, list[Row]] = {}
    for row in step["rows"]:
        if row["point"]["mode"] == "eager" and "seconds" in row:
            by_precision.setdefault(row["point"]["precision"], []).append(row)
    peaks = {(row["point"]["precision"], row["contender"]): row for row in beside["rows"]} if beside else {}
    rows = []
    for name in dict.fromkeys(row["contender"] for rows in by_precision.values() for row in rows):
        cells = [name]
        for precision_rows in by_precision.values():
            time = next((row["seconds"] for row in precision_rows if row["contender"] == name), None)
            share = ratio(of(precision_rows, name, "seconds"), of(precision_rows, "PEFT, all", "seconds"))
            cells.append(NOT_MEASURED if time is None else f"{seconds(time)} ({share})")
        for precision in by_precision:
            peak = peaks.get((precision, name), {}).get("peak_memory_mib")
            cells.append(NOT_MEASURED if peak is None else f"{peak:,.0f} MiB")
        rows.append(cells)
    heads = ["", *by_precision, *(f"{precision}, peak" for precision in by_precision)]
    # A column of memory that nobody measured says nothing.
    used = [i for i in range(len(heads)) if i <= len(by_precision) or any(row[i] != NOT_MEASURED for row in rows)]
    text = table([heads[i] for i in used], [[row[i] for i in used] for row in rows])
    return f"{_about(step, memory)}\n\n{text}"


def _about(step: dict[str, Any], memory: dict[str, Any] | None) -> str:
    """What the table of the training step shows, of which machine and source."""
    about, point = step["environment"], step["rows"][0]["point"]
    packages = about["packages"]
    text = (
        f"One training step of {point['model']}, batch {point['batch']}, r = {point['r']}.{repetitions(step['rows'])} "
        f"In parentheses is the ratio to PEFT {packages['peft']} on all layers, in the same process. "
        f"{about['device']}, torch {packages['torch']}; {source(about)}. "
    )
    if memory_beside(step, memory) is not None and memory is not None:
        text += "Peak memory is that of a process of its own, libraries included"
        other = source(memory["environment"])
        text += f"; {other}. " if other != source(about) else ". "
    elif memory is not None:
        text += f"Peak memory was measured on another machine, {memory['environment']['device']}. "
    for precision, reason in left_out(step["rows"]).items():
        text += f"{precision}: not measured, because {reason}. "
    return text + (
        "'Few' is the attention and MLP output projections of the last two layers; 'frozen, dx everywhere' trains the "
        "head alone, but carries the gradient down to the first layer, which any update of that layer needs."
    )


def left_out(rows: Sequence[Row]) -> dict[str, str]:
    """The precisions of which nothing was measured, those of one reason together, and the reason."""
    measured = {row["point"]["precision"] for row in rows if "seconds" in row}
    reasons = {row["point"]["precision"]: row["skipped"] for row in rows if "skipped" in row}
    found: dict[str, str] = {}
    for reason in dict.fromkeys(reasons.values()):
        names = [name for name, why in reasons.items() if why == reason and name not in measured]
        if names:
            found[" and ".join(names)] = reason
    return found
