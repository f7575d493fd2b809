"""The glyph CLIP as a task: handwritten digits to learn through prompts, letters to keep by zero-shot."""

from __future__ import annotations

import functools

from benchmarks.selection.task import Configuration, Record, record
from slora.demo.clip_methods import clip_settings, clip_source, glyph_clip_run

RANK = {"r": 16, "lora_alpha": 16, "lr_hold": 0.4}


class Glyphs:
    """The image tower of the glyph CLIP learns the digits; prompts are its head, so there is no linear probe."""

    name = "glyphs"
    title = "Digits for the glyph CLIP"
    family = "glyph CLIP"
    target = "target %"
    retention = {"zero-shot": "zero-shot lost"}  # noqa: RUF012 (the protocol's attribute)
    rates = (9e-4, 2.5e-3, 7e-3, 2e-2)
    probe = False
    retains = ("old",)

    def check(self) -> None:
        """Nothing can be missing: digits come with scikit-learn, the model and the letters with slora."""

    def run(self, configuration: Configuration, seed: int, validation: bool = False, quick: bool = False) -> Record:
        """Train and measure once."""
        source = _source(quick, validation)
        settings = clip_settings({**RANK, **configuration.settings}, seed, quick)
        retain = source.retained if configuration.retain else None
        found = glyph_clip_run(settings, source, retain=retain, scales=configuration.scales, validation=validation)
        return record(found, {"zero-shot": "zero_shot"})


def task(name: str) -> Glyphs:
    """Return the task."""
    return Glyphs()


_source = functools.lru_cache(2)(clip_source)
