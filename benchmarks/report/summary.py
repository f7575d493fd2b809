"""Tables of several result files: the targets, the training step in the project's README, the parts of the proof.

A table is of one machine and names every commit that it has numbers of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import targets
from benchmarks.report.tables import Row, of, origin, ratio, repetitions, seconds, table
from benchmarks.results import NOT_MEASURED, source


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


def targets_tables(results: Mapping[str, targets.Results]) -> list[str]:
    """Every target for these devices, by machine and commit: what was measured, the limit, and whether it is met."""
    tables = []
    for machine, group in targets.by_origin(targets.judged(results, list(results))).items():
        tables += [f"{machine}.", table(["target", "measured", "limit", ""], [one.row for one in group])]
    return tables


def memory_beside(step: dict[str, Any], memory: dict[str, Any] | None) -> dict[str, Any] | None:
    """The result file of the memory, where it is of the machine that the times are of."""
    same = memory is not None and memory["environment"]["device"] == step["environment"]["device"]
    return memory if same else None


def on_gpus(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """The table of the training step for every GPU of which there are results, or that there are none."""
    texts = []
    for device, cases in results.items():
        if device == "cpu" or not cases:
            continue
        if "train_step" in cases and any("seconds" in row for row in cases["train_step"]["rows"]):
            texts.append(train_step_table(cases["train_step"], None))
        else:
            others = ", ".join(name for name in cases if name != "train_step") or "nothing"
            texts.append(f"{device}: the training step was {NOT_MEASURED}; what was measured is {others}.")
    return texts or [f"GPU: {NOT_MEASURED}."]


def train_step_table(step: dict[str, Any], memory: dict[str, Any] | None) -> str:
    """One row per contender: seconds (and their ratio to PEFT on all layers) and peak memory at each precision.

    Of several models it shows the first. A step that is one CUDA graph has columns of its own.
    """
    beside = memory_beside(step, memory)
    columns: dict[str, list[Row]] = {}
    for row in step["rows"]:
        if "seconds" in row and _shown(row, step):
            columns.setdefault(_column(row["point"]), []).append(row)
    peaks = {(row["point"]["precision"], row["contender"]): row for row in beside["rows"]} if beside else {}
    rows = []
    for name in dict.fromkeys(row["contender"] for rows in columns.values() for row in rows):
        cells, weights = [name], []
        for column in columns.values():
            own = next((row for row in column if row["contender"] == name), {})
            cells.append(f"{seconds(own['seconds'])} ({_over_peft(own, column)})" if own else NOT_MEASURED)
            other = peaks.get((column[0]["point"]["precision"], name), {})
            peak = own.get("peak_memory_mib", other.get("peak_memory_mib"))
            weights.append(NOT_MEASURED if peak is None else f"{peak:,.0f} MiB")
        rows.append(cells + weights)
    heads = ["", *columns, *(f"{column}, peak" for column in columns)]
    # A column of memory that nobody measured says nothing.
    used = [i for i in range(len(heads)) if i <= len(columns) or any(row[i] != NOT_MEASURED for row in rows)]
    text = table([heads[i] for i in used], [[row[i] for i in used] for row in rows])
    return f"{_about(step, memory, [row for column in columns.values() for row in column])}\n\n{text}"


def _shown(row: Row, step: dict[str, Any]) -> bool:
    point, first = row["point"], step["rows"][0]["point"]
    same = all(point[key] == first[key] for key in ("model", "batch", "r"))
    return same and point["mode"] in ("eager", "graph")


def _column(point: dict[str, Any]) -> str:
    return f"{point['precision']}, CUDA graph" if point["mode"] == "graph" else str(point["precision"])


def _over_peft(own: Row, column: Sequence[Row]) -> str:
    """The ratio to PEFT on all layers; a dash where its time was taken by another clock."""
    base = next((row for row in column if row["contender"] == "PEFT, all"), {})
    if own.get("clock") != base.get("clock"):
        return "-"
    return ratio(of([own], own["contender"], "seconds"), of(column, "PEFT, all", "seconds"))


def _about(step: dict[str, Any], memory: dict[str, Any] | None, shown: Sequence[Row]) -> str:
    """What the table of the training step shows, of which machine and source."""
    about, point = step["environment"], step["rows"][0]["point"]
    packages = about["packages"]
    text = (
        f"One training step of {point['model']}, batch {point['batch']}, r = {point['r']}.{repetitions(shown)} "
        f"In parentheses is the ratio to PEFT {packages.get('peft') or ''}".rstrip()
        + f" on all layers, in the same process. {about['device']}, torch {packages['torch']}; {source(about)}. "
    )
    uncaptured = dict.fromkeys(
        f"{row['contender']} in {_column(row['point'])}" for row in shown if "not_captured" in row
    )
    if uncaptured:
        text += f"Not captured in a CUDA graph, but launched call by call: {'; '.join(uncaptured)}. "
    if any("peak_memory_mib" in row for row in shown):
        text += "Peak memory is what the step has allocated at its peak, parameters included. "
    if memory_beside(step, memory) is not None and memory is not None:
        text += "Peak memory is that of a process of its own, libraries included"
        other = source(memory["environment"])
        text += f"; {other}. " if other != source(about) else ". "
    elif memory is not None:
        text += f"Peak memory was measured on another machine, {memory['environment']['device']}. "
    for precision, reason in left_out([row for row in step["rows"] if _shown(row, step)]).items():
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
