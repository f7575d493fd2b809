"""`benchmarks/README.md`, `docs/compatibility.md`, and the marked tables of README, from result files alone.

    <!-- demo-table -->        docs/demo.json, written by `slora demo`
    <!-- train-step-table -->  results/cpu/train_step.json and train_memory.json, results/<GPU>/train_step.json
    <!-- works-with -->        results/compatibility.json, of which docs/compatibility.md is the whole

What has no result file says "not measured".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import compatibility, summary, tables
from benchmarks.report.packages import need
from benchmarks.results import CASES, NOT_MEASURED, BenchmarkError, read_result, results_in
from slora.io.atomic import write_text

ROOT = Path(__file__).parents[2]
NONE = f"{NOT_MEASURED.capitalize()}."
# Devices that targets are set for come first, whether they were measured or not.
DEVICES = ("cpu", "nvidia-h100", "nvidia-h200")
# What a table or a figure takes from the points of a case.
LAYER = {"K", "N", "M", "r", "active", "dtype"}
STEP = {"model", "batch", "r", "precision", "mode"}
POINTS = {"linear": LAYER, "scaling": LAYER | {"curve"}, "train_step": STEP, "train_memory": {"precision"}}


def all_results(root: Path = ROOT) -> dict[str, dict[str, dict[str, Any]]]:
    """Results by device and case; a device without any is an empty entry."""
    folder = root / "benchmarks" / "results"
    found: dict[str, dict[str, dict[str, Any]]] = {device: {} for device in DEVICES}
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if path.is_dir() and (results := results_in(path)):
            found[path.name] = results
            for case, result in results.items():
                require_points(path / f"{case}.json", result)
    return found


def require_points(path: Path, result: dict[str, Any]) -> None:
    """Refuse a result that this page cannot show.

    Raises:
        BenchmarkError: it is of an unknown case, has no rows, or a point lacks what the case has.
    """
    case = result["case"]
    if case not in CASES:
        raise BenchmarkError(f"{path} is of the unknown case {case!r}; there are {', '.join(CASES)}; remove it")
    lacking = sorted({key for row in result["rows"] for key in POINTS.get(case, set()) - row["point"].keys()})
    lacking = [f"{key} in a point" for key in lacking] + ["rows"] * (not result["rows"])
    if lacking:
        raise BenchmarkError(f"{path} is damaged: it lacks {', '.join(lacking)}; run the case {case!r} again")


def filled(readme: str, root: Path = ROOT) -> str:
    """Return the text of the README with every marked table made anew from the files under `root`.

    Raises:
        BenchmarkError: a mark is missing or there twice, or a result file cannot be read.
    """
    results = all_results(root)
    cpu = results["cpu"]
    demo_file = root / "docs" / "demo.json"
    census = compatibility.read(root)
    texts = {
        "demo-table": demo_table(demo_file) if demo_file.exists() else NONE,
        "works-with": NONE if census is None else compatibility.summary(census),
        "train-step-table": "\n\n".join(
            [
                NONE
                if "train_step" not in cpu
                else summary.train_step_table(cpu["train_step"], cpu.get("train_memory")),
                *summary.on_gpus(results),
            ]
        ),
    }
    for name, text in texts.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        escaped = text.replace("\\", "\\\\")
        readme, count = re.subn(pattern, rf"\g<1>{escaped}\n\g<2>", readme, flags=re.S)
        if count != 1:
            raise BenchmarkError(f"README.md has {count} tables marked {name}; expected one")
    return readme


def demo_table(path: Path) -> str:
    """The table of `path`, which `slora demo` has written.

    Raises:
        BenchmarkError: it is no such file, or what `slora demo` needs is missing.
    """
    need("rich")
    need("matplotlib")
    from benchmarks.report import demo

    try:
        return demo.demo_table(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, LookupError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise BenchmarkError(f"{path} is not what `slora demo` writes ({reason}); run `make demo` again") from error


def page(root: Path = ROOT) -> str:
    """The text of `benchmarks/README.md`."""
    from benchmarks.report import figures

    results = all_results(root)
    parts = [INTRODUCTION, "## Targets", *summary.targets_tables(results)]
    for device, cases in results.items():
        parts.append(f"## {device}")
        if not cases:
            missing = ", ".join(name for name, case in CASES.items() if "cuda" in case.devices)
            parts.append(f"{NOT_MEASURED.capitalize()}: {missing}.")
            continue
        kind = "cpu" if device == "cpu" else "cuda"
        for name, case in CASES.items():
            if kind not in case.devices:
                continue
            parts.append(f"### {name}: {case.summary}")
            if name not in cases:
                parts.append(NONE)
                continue
            parts.append(tables.origin(cases[name]))
            parts += [f"![{title}](figures/{file})" for file, title in figures.of_case(device, name, cases)]
            parts.append(tables.case_table(cases[name]))
        for proof in sorted((root / "benchmarks" / "results" / device).glob("proof*.json")):
            stage = proof.stem.removeprefix("proof").replace("-", " ")
            parts += [f"### proof: `python -m benchmarks gpu{stage}`", *summary.proof_tables(read_result(proof))]
    return "\n\n".join([*parts, PREDICTED]) + "\n"


PREDICTED = """\
## Predicted, not measured

What the compiler says of the GPU kernels without a GPU: registers, spills, shared memory, tensor-core instructions; of
the merge also bytes, instructions and predicted times. Nothing in these files was run. They are in
[results/audit](results/audit), written by `python -m benchmarks.audit` (the layer's kernels) and
`python -m benchmarks.merge_kernel` (the merge)."""


INTRODUCTION = """\
# Benchmarks

Written by `python -m benchmarks report` from the files under `results/`; nothing here is typed by hand. Contenders of a
table took turns in one process; a ratio is one of medians. A result that is wrong is not timed.

```bash
python -m benchmarks list                                      # the cases
python -m benchmarks run --case linear --device cpu            # one case; --full for the whole grid
python -m benchmarks run --case all --device cuda
python -m benchmarks report                                    # this page, the figures, README's tables
python -m benchmarks compare BEFORE.json AFTER.json            # what moved beyond noise
python -m benchmarks targets                                   # the targets of targets.toml, met or missed
python -m benchmarks compatibility                             # which architectures slora adapts rightly; an hour
python -m benchmarks gpu first                                 # on a GPU: build, kernels, one layer, merge; 4 minutes
python -m benchmarks gpu second                                # on a GPU: train steps, tests, profile; 7 minutes
python -m benchmarks gpu                                       # on a GPU: everything, in 9 minutes
```

Either stage stands alone. Both write into the device's own folder, at most eight files together: one per case,
`candidates.json` (every candidate of every form against an fp32 reference), and a `proof-<stage>.json` (the state of
every part) and a `gpu-<stage>.log` for each stage. `--parts NAME ...` runs single parts; `--dry-run` rehearses on a
CPU.

| to find | look in |
|---|---|
| the cases and their grids | `cases/`, listed in `results.py` |
| what is compared | `contenders/layer.py` (one layer), `contenders/model.py` (a model), `models.py` |
| how a time is taken | `timing.py`, `roofline.py` |
| FLOPs, bytes and the model of costs | `counting.py` |
| the result files | `results.py` (their form), `results/<device>/<case>.json` |
| this page and the figures | `report/` |
| the targets | `targets.toml` |
| what slora works with | `compatibility/`; its page is [docs/compatibility.md](../docs/compatibility.md) |
| the proof on a GPU | `gpu.py` (its order, stages and table), `proof/` (its parts) |
| whether each kernel is right | `candidates.py` |

In bf16 PEFT's adapters are bf16, which is its fastest form, and slora's are fp32. PEFT's merge is the exception: its
adapters are fp32 there, as slora's are.

The brackets of a target are the ratios that the 20th and 80th percentiles of its two times give. Both are
of one run; on a machine that others share, another run may differ by more (`LOG.md` has such runs side by side). What
`compare` calls moved, a rank test on the repetitions of both runs tells from chance; five in each can show it, three
cannot.

"% GEMM" and "% copy" are parts of the ceilings that the same run measured. "MB" is the least that the form of the
computation moves (`counting.py`)."""


def texts(root: Path = ROOT) -> dict[Path, str]:
    """The files that `report` writes, figures left out."""
    readme = root / "README.md"
    census = compatibility.read(root)
    return {
        root / "benchmarks" / "README.md": page(root),
        readme: filled(readme.read_text(encoding="utf-8"), root),
        **({} if census is None else {root / "docs" / "compatibility.md": compatibility.page(census)}),
    }


def stale(root: Path = ROOT) -> list[Path]:
    """Which of these files are not what the result files give."""
    return [path for path, text in texts(root).items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def write(root: Path = ROOT, say: Callable[[str], None] = print) -> None:
    """Write them, and the figures. Every text is made before the first is written."""
    from benchmarks.report import figures

    made = texts(root)
    drawn = figures.draw_all(all_results(root), root / "benchmarks" / "figures")
    for path, text in made.items():
        write_text(path, text)
    for path in [*made, *drawn]:
        say(str(path))
