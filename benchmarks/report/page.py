"""The pages that people read, from result files and the templates of this folder alone.

    benchmarks/README.md             what a step costs, what memory costs, how near the limit is, the targets
    benchmarks/results/<device>.md   every case
    benchmarks/results/selection.md  the selection strategies: results/selection/
    benchmarks/results/retention.md  what keeps old knowledge: the same folder
    docs/compatibility.md            results/compatibility.json
    README.md                        its marked tables: the demo (docs/demo.json), the training step, the census

What has no result file says "not measured".
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import targets
from benchmarks.report import tables
from benchmarks.report.tables import Cases
from benchmarks.results import CASES, ROOT, BenchmarkError, need, read_result, results_in, source
from benchmarks.selection.registry import TABLES
from benchmarks.selection.store import Store
from slora.io.atomic import write_text

jinja2, judge, figures, selection = (
    need(name, "the report needs it: pip install -e '.[train]' --no-build-isolation")
    for name in ("jinja2", "slora.demo.judge", "benchmarks.report.figures", "benchmarks.report.selection")
)
# The devices that targets are set for come first, whether they were measured or not.
DEVICES = ("cpu", "nvidia-h100", "nvidia-h200")


def all_results(root: Path = ROOT) -> dict[str, Cases]:
    """Results by device and case; a device without any is an empty entry."""
    folders = [path for path in sorted((root / "benchmarks" / "results").glob("*")) if path.is_dir()]
    found = {path.name: results for path in folders if (results := results_in(path))}
    return {device: found.get(device, {}) for device in dict.fromkeys([*DEVICES, *found])}


def render(template: str, **values: Any) -> str:
    """The text of a template of this folder, without blank lines in a row."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, extensions=["jinja2.ext.do"], trim_blocks=True, lstrip_blocks=True)
    values |= {"source": source, "targets": targets, "tables": tables, "Counter": Counter}
    return re.sub(r"\n{3,}", "\n\n", environment.get_template(template).render(values)).strip() + "\n"


def texts(root: Path = ROOT) -> dict[Path, str]:
    """The files that `report` writes, figures left out.

    Raises:
        BenchmarkError: a file cannot be read, or README lacks a mark.
    """
    results, folder, readme = all_results(root), root / "benchmarks" / "results", root / "README.md"
    census, demo = (_read(path) for path in (folder / "compatibility.json", root / "docs" / "demo.json"))
    drawn = {device: figures.links(device, cases) for device, cases in results.items()}
    compared = {name: found for name in TABLES if (found := selection.page(_runs(root), name))}
    judged = targets.judged(results, results)
    marked = {
        "demo-table": render("demo.md.j2", demo=demo, judge=judge),
        "works-with": render("works_with.md.j2", census=census),
        "train-step-table": render("train_step.md.j2", results=results),
    }
    made = {
        readme: _filled(readme.read_text(encoding="utf-8"), marked),
        root / "benchmarks" / "README.md": render(
            "readme.md.j2", results=results, figures=drawn, judged=judged, selection=bool(compared)
        ),
    }
    for device, cases in results.items():
        files = [read_result(path) for path in sorted((folder / device).glob("*.json"))]
        if files:
            made[folder / f"{device}.md"] = render(
                "device.md.j2", device=device, cases=cases, known=CASES, figures=drawn[device],
                validations=[file for file in files if "parts" in file],
            )  # fmt: skip
    made |= {folder / f"{name}.md": render(f"{name}.md.j2", **found) for name, found in compared.items()}
    if census:
        made[root / "docs" / "compatibility.md"] = render("compatibility.md.j2", census=census)
    return made


def _filled(readme: str, made: dict[str, str]) -> str:
    """The text of the README with each marked table as it is `made`; raises where a mark is missing or there twice."""
    for name, text in made.items():
        parts = re.split(rf"(<!-- {name} -->\n|<!-- /{name} -->)", readme)
        if len(parts) != 5:
            raise BenchmarkError(f"README.md needs one table between <!-- {name} --> and <!-- /{name} -->")
        readme = "".join([*parts[:2], text, *parts[3:]])
    return readme


def _read(path: Path) -> Any:
    """What a file of JSON holds, None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def stale(root: Path = ROOT) -> list[Path]:
    """Which of these files are not what the result files give."""
    return [path for path, text in texts(root).items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def write(root: Path = ROOT) -> None:
    """Write them, and the figures, and print their paths. Every text is made before the first is written."""
    made = texts(root)
    for path, text in made.items():
        write_text(path, text)
    folder = root / "benchmarks" / "figures"
    for path in [*made, *figures.draw_all(all_results(root), folder), *selection.draw_all(_runs(root), folder)]:
        print(path)


def _runs(root: Path) -> Store:
    """The runs of the selection strategies."""
    return Store(root / "benchmarks" / "results" / "selection")
