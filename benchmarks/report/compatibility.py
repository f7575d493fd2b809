"""`docs/compatibility.md`, and README's sentence of what slora works with, from what the census wrote."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.report.tables import table
from benchmarks.results import BenchmarkError, read_result, source

# The verdicts of `compatibility/examination.py`, as README's sentence says them.
SAID = {
    "nothing": "without a linear layer below the head", "refused": "refused by name",
    "skipped": "not tried, for a reason", "failed": "crashed", "wrong": "wrong",
}  # fmt: skip
LIBRARIES = ("timm", "open_clip", "torchvision", "transformers")
PACKAGES = {"open_clip": "open_clip_torch"}
SHOWN = 3
Census = dict[str, Any]
Row = dict[str, Any]


def read(root: Path) -> Census | None:
    """The result of the whole census under `root`; None where there is none.

    Raises:
        BenchmarkError: it is damaged, or of a part.
    """
    path = root / "benchmarks" / "results" / "compatibility.json"
    if not path.exists():
        return None
    census = read_result(path)
    again = "run: python -m benchmarks compatibility"
    rows = census.get("architectures")
    texts = {"library", "family", "verdict", "reason"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and texts <= row.keys() for row in rows):
        raise BenchmarkError(f"{path} is damaged: an architecture lacks one of {', '.join(sorted(texts))}; {again}")
    if not census.get("complete", False):
        raise BenchmarkError(f"{path} is of a census that was cut; {again}")
    return census


def summary(census: Census) -> str:
    """README's sentence."""
    parts = []
    for library in LIBRARIES:
        rows = _of(census, library)
        count = Counter(row["verdict"] for row in rows)
        rest = ", ".join(f"{count[verdict]} {words}" for verdict, words in SAID.items() if count[verdict])
        version = census["environment"]["packages"].get(PACKAGES.get(library, library))
        parts.append(f"* {library} {version}: {count['right']} of {len(rows)} {_noun(library)}{rest and f' ({rest})'}")
    return (
        "Adapted, trained for a step, merged, saved, loaded and unloaded with the right values and bits, by\n"
        "`python -m benchmarks compatibility`:\n\n" + "\n".join(parts) + "\n\n"
        "[A row for each](docs/compatibility.md) says what is adapted and the reason for every gap."
    )


def _noun(library: str) -> str:
    return {"timm": "families", "open_clip": "families", "torchvision": "models"}.get(library, "architectures")


def page(census: Census) -> str:
    """The text of `docs/compatibility.md`."""
    about = census["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items() if version)
    parts = [INTRODUCTION, f"{about['device']}; {packages}; {source(about)}."]
    for library in LIBRARIES:
        rows = [_line(row) for row in _of(census, library)]
        parts += [f"## {library}", table(("", "model", "layers", "result", "merge error", "gaps"), rows)]
    return "\n\n".join(parts) + "\n"


def _line(row: Row) -> tuple[str, ...]:
    result = {"nothing": "nothing to adapt", "skipped": "not tried"}.get(row["verdict"], str(row["verdict"]))
    error = f"{row['merge_error']:.0e}" if "merge_error" in row else ""
    return row["family"], row.get("model", ""), str(row.get("adapted", "")), result, error, "; ".join(_gaps(row))


def _gaps(row: Row) -> list[str]:
    """Why an architecture is not all that one would wish, and what is left out of it."""
    gaps = [row["reason"].replace("|", "\\|")] if row["reason"] else []
    unreached = row.get("unreached", [])
    if unreached:
        more = f" and {len(unreached) - SHOWN} more" if len(unreached) > SHOWN else ""
        named = ", ".join(f"`{name}`" for name in unreached[:SHOWN])
        gaps.append(f"the model's own output does not depend on {named}{more}")
    if row.get("compared_in") == "float32":
        gaps.append("compared in fp32, since it does not run in fp64")
    if row.get("elsewhere"):
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in row["elsewhere"].items())
        gaps.append(f"not adapted: {shares}")
    return gaps


def _of(census: Census, library: str) -> list[Row]:
    return [row for row in census["architectures"] if row["library"] == library]


INTRODUCTION = """\
# What slora works with

Written by `python -m benchmarks report` from `benchmarks/results/compatibility.json`, which
`python -m benchmarks compatibility` writes (`--quick` for a few, or name some: `compatibility beit timm/eva`). Every
architecture is built with random weights and small images or sequences. Of a timm family it is the smallest model that
has a linear layer, with two blocks where it takes a depth; open_clip's configs are grouped by all that is not a size;
of transformers it is the bare model of a tiny config. Layers are chosen by `target_modules="all-linear"`. "right" says
all of this:

* after `inject` the output is the base model's, bit for bit (without gradients, and without
  PyTorch's fused attention);
* in a training step, with in-place activations and dropout, every layer that the model's own step reaches gets
  gradients;
* with random blocks that change every weight by a tenth of its norm, the output and the gradients of A, B and gates of
  every layer are those of the plain model with `W + c B A` in place of its weights: to half of all digits, in fp64;
* merged weights are `W + c B A` within the rounding of their sums in fp32, and the merged output is that of a plain
  model with these weights, bit for bit; `unmerge` gives the output before back, bit for bit;
* an adapter that is saved and loaded into a fresh copy of the model gives the same output, bit for bit;
* `unload` gives the base model back, bit for bit.

"layers" are the adapted ones. "merge error" is how far the merged output is from the unmerged one in fp32, relative to
its norm: rounding, which the model amplifies. "not adapted" are the modules that hold a twentieth or more of all
parameters. "refused" is slora's own error, at the step that is named; "not tried" is what does not run without slora
either, or is too large."""
