"""The glyph CLIP as a task: handwritten digits to learn through prompts, letters to keep by zero-shot."""

from __future__ import annotations

import functools
import time
from typing import Any, cast

from benchmarks.results import BenchmarkError
from benchmarks.selection.task import Configuration, Record
from slora.demo.clip_methods import ClipSource, clip_settings, clip_source, glyph_clip_run

RANK = {"r": 16, "lora_alpha": 16, "lr_hold": 0.4}


class Glyphs:
    """The image tower of the glyph CLIP learns the digits."""

    name = "glyphs"
    title = "Digits for the glyph CLIP"
    family = "glyph CLIP"
    target = "target %"
    retention = {"zero-shot": "zero-shot lost"}  # noqa: RUF012 (the protocol's attribute)
    rates = (9e-4, 2.5e-3, 7e-3, 2e-2)
    probe = False

    def check(self) -> None:
        """Nothing can be missing: digits come with scikit-learn, the model and the letters with slora."""

    def run(self, configuration: Configuration, seed: int, validation: bool = False, quick: bool = False) -> Record:
        """Train and measure once.

        Raises:
            BenchmarkError: the configuration trains a head, or retains something else than old images.
        """
        if configuration.settings.get("method") == "linear":
            raise BenchmarkError("prompts are the head of the glyph CLIP, so there is no linear probe")
        if configuration.retain not in (None, "old"):
            raise BenchmarkError(f"retain={configuration.retain!r} is not for the glyph CLIP; use 'old', or None")
        source = _source(quick, validation)
        settings = clip_settings({**RANK, **configuration.settings}, seed, quick)
        retain = source.retained if configuration.retain else None
        processor, wall = time.process_time(), time.monotonic()
        found = glyph_clip_run(settings, source, retain=retain, scales=configuration.scales, validation=validation)
        # The training's own clock is the wall's; of a machine that others use, a process has only a part.
        share = (time.process_time() - processor) / (time.monotonic() - wall)
        counts = {name: found[name] for name in ("active", "blocks", "ranks", "kept", "flops")}
        scaled = [{"scale": each["scale"], **_measures(each)} for each in found["scaled"]]
        seconds = round(found["seconds"] * min(1.0, share), 2)
        return cast(Record, {**_measures(found), **counts, "seconds": seconds, "scaled": scaled})


def task(name: str) -> Glyphs:
    """Return the task."""
    return Glyphs()


@functools.lru_cache(2)
def _source(quick: bool, validation: bool) -> ClipSource:
    return clip_source(quick, validation)


def _measures(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "target": round(100 * found["accuracy"], 4),
        "nll": round(found["nll"], 5),
        "lost": {"zero-shot": round(found["zero_shot"], 4)},
        "drift": float(f"{found['drift']:.5g}"),
    }
