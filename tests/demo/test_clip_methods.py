"""The demo's runs on the glyph CLIP: what an entry measures, and the section that shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip import build_zero_shot_classifier

from slora.demo import clip_methods
from slora.demo.captions import TEMPLATES, GlyphTokenizer
from slora.demo.clip_methods import CLIP_METHODS, ClipSource, clip_settings, clip_source, glyph_clip_run
from slora.demo.clip_page import CLIP_HEADINGS, clip_rows, clip_sections, clip_sentence
from slora.demo.letters import CLASSES

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def source() -> ClipSource:
    return clip_source(quick=True)


@torch.no_grad()
def test_letters_are_classified_by_open_clips_zero_shot_classifier(source: ClipSource) -> None:
    clip = clip_methods.pretrained()
    classifier = build_zero_shot_classifier(clip.model, GlyphTokenizer(), CLASSES, TEMPLATES)
    images, labels = source.queries
    found = (clip.model.encode_image(images) @ classifier).argmax(1)
    assert source.letters == (found == labels).double().mean().item() > 0.8


def test_a_run_trains_the_image_tower_and_measures_both_tasks(source: ClipSource) -> None:
    # FLOPs are counted with the first seed alone, which takes longer than this run.
    settings = clip_settings({"method": "lora", "r": 2, "lora_alpha": 2, "lr": 1e-2}, seed=1, quick=True)
    entry = glyph_clip_run(settings.replace(max_steps=2), source, retain=source.retained, scales=(1e-9,))
    assert entry["active"] == entry["blocks"] == 36
    assert all(name.startswith("visual.") for name in entry["block_map"])
    # Rank 2 on six layers of width 80, in blocks q, k, v, out_proj, c_fc and c_proj; and logit_scale.
    assert entry["kept"] == 6 * 2 * (4 * (80 + 80) + 2 * (80 + 320)) + 1
    assert entry["drift"] > 0
    (nothing,) = entry["scaled"]
    assert nothing["zero_shot"] == 0
    assert nothing["drift"] < 1e-9
    assert abs(nothing["accuracy"] - clip_methods.digits_before()) < 1e-9


def made_up() -> dict[str, Any]:
    """The entry "clip" of a result of two seeds: LoRA loses 10 and 14 points, all others 2."""
    runs = []
    for method in CLIP_METHODS:
        for seed in range(2):
            lost = 10.0 + 4 * seed if method == "lora" else 2.0
            measured = {"accuracy": 0.9 + 0.02 * seed, "nll": 0.5, "zero_shot": lost, "drift": 0.1}
            scaled = [{"scale": 0.5, **measured, "zero_shot": lost / 2}] if method == "lora" else []
            runs.append(
                {"method": method, "seed": seed, **measured, "active": 4, "kept": 1000, "seconds": 2.0,
                 "flops": None if seed else 10**12, "scaled": scaled}
            )  # fmt: skip
    return {"before": {"letters": 0.97, "digits": 0.12}, "settings": {}, "runs": runs}


def test_rows_are_means_with_the_deviation_over_seeds() -> None:
    first, scaled, *others = clip_rows(made_up())
    assert len(others) == len(CLIP_METHODS) - 1
    assert first == ["LoRA on all", "4", "91.00 ± 1.41", "0.500 ± 0.000", "12.00 ± 2.83", "0.100 ± 0.000", "1,000",
                     "1.00", "2.0"]  # fmt: skip
    assert scaled[0] == "the same, scaled by 0.5"
    assert scaled[4] == "6.00 ± 1.41"
    assert all(len(row) == len(CLIP_HEADINGS) for row in (first, scaled, *others))


def test_the_sentence_and_the_picture_say_what_the_rows_do() -> None:
    (section,) = clip_sections({"clip": made_up()})
    assert section.text == [clip_sentence(made_up())]
    assert "97.0 % of letters in new fonts, and 12.0 % of handwritten digits" in section.text[0]
    assert "LoRA on all 91.0 % and 12.0 ± 2.8, scaled by 0.5 91.0 % and 6.0 ± 1.4" in section.text[0]
    (picture,) = section.pictures
    assert "2.0 by 4 blocks and 2.0 by all with distillation, 12.0 by all without" in picture.alt


def test_a_result_without_a_clip_has_no_section() -> None:
    stored = json.loads((Path(__file__).parents[2] / "docs" / "demo.json").read_text(encoding="utf-8"))
    assert clip_sections(stored | {"clip": None}) == []
