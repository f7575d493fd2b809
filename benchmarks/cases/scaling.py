"""Cost of one layer against rank, active share and tokens, beside what the model of costs predicts.

The prediction is the frozen layer's time, taken in turns with the others at the same point, plus the bytes that the
form moves beyond it at the measured copy ceiling, plus the update's FLOPs at the measured GEMM ceiling
(`counting.predicted_seconds`). `deviation` is the measured time over the predicted one, less 1; most of both is the
frozen layer. `update_seconds` is what each round took beyond the frozen layer in the same round, `update_deviation` its
median over the prediction, less 1. `curve` names the axis that a point lies on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import counting
from benchmarks.cases import linear
from benchmarks.contenders.layer import FROZEN, Shape
from benchmarks.results import Settings, spread

K, N = 768, 3072
BLOCKS = 16
CONTENDERS = (FROZEN, "slora, torch", "slora, triton", "slora, auto")


def grid(settings: Settings) -> list[tuple[str, Shape]]:
    """`(curve, point)`; the middle of the curves is shared but measured on each, so that every curve is one run."""
    if settings.grid == "tiny":
        shapes = [("rank", Shape(32, 48, 24, r, 1, 1, "fp32")) for r in (2, 4)]
        shapes += [("active", Shape(32, 48, 24, 4, active, BLOCKS, "fp32")) for active in (0, 4)]
        return shapes + [("tokens", Shape(32, 48, M, 4, 1, 1, "fp32")) for M in (8, 24)]
    M, dtype = (50432, "bf16") if settings.on_gpu else (3152, "fp32")
    ranks: tuple[int, ...] = (4, 16, 64, 128)
    shares: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    tokens: tuple[int, ...] = (3152, 12608, 25216, 50432) if settings.on_gpu else (788, 1576, 3152, 6304)
    if settings.grid == "quick":
        ranks, shares, tokens = (16,), (0, 4, 16), tokens[:1]
    if settings.grid == "full":
        ranks, shares = (*ranks[:2], 32, *ranks[2:], 256), (*shares[:4], 6, 8, 12, 16)
    points = [("active", Shape(K, N, M, 16, active, BLOCKS, dtype)) for active in shares]
    points += [("rank", Shape(K, N, M, r, 1, 1, dtype)) for r in ranks]
    return points + [("tokens", Shape(K, N, tokens_, 16, 1, 1, dtype)) for tokens_ in tokens]


def run(settings: Settings, ceilings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of every point, with the prediction and the deviation from it."""
    names = set(CONTENDERS)
    if not settings.on_gpu:
        names -= {"slora, auto", "slora, triton"}  # "auto" is "torch" there
    for curve, shape in grid(settings):
        if settings.stop():
            return
        rows = linear.measure(shape, settings, ceilings, names, inference=False)
        for row in rows:
            row["point"] = {"curve": curve, **row["point"]}
        predict(rows, ceilings)
        for row in rows:
            if "deviation" in row:
                print(f"  {row['contender']}: {row['deviation']:+.1%} from the prediction", file=sys.stderr)
        yield from rows


def predict(rows: Sequence[dict[str, Any]], ceilings: dict[str, Any]) -> None:
    """Put the prediction and the deviations from it into the rows of one point that have a form."""
    frozen = next((row["forward_backward"] for row in rows if row["contender"] == FROZEN and _timed(row)), None)
    if frozen is None:
        return
    for row in rows:
        if row["contender"] == FROZEN or not _timed(row) or "form" not in row:
            continue
        point, measured = row["point"], row["forward_backward"]
        active, _, blocks = point["active"].partition("/")
        row["predicted"] = counting.predicted_seconds(
            frozen["median"], row["form"], point["M"], point["N"], point["K"], point["r"], int(active),
            int(active) / int(blocks or 1), point["dtype"], 4 if point["dtype"] == "fp32" else 2, ceilings,
        )  # fmt: skip
        row["deviation"] = measured["median"] / row["predicted"] - 1
        beyond = row["predicted"] - frozen["median"]
        if beyond > 0:
            # Round by round: both were taken within moments of each other.
            pairs = zip(measured["values"], frozen["values"], strict=True)
            row["update_seconds"] = spread([one - other for one, other in pairs])
            row["update_deviation"] = row["update_seconds"]["median"] / beyond - 1


def _timed(row: dict[str, Any]) -> bool:
    return "forward_backward" in row
