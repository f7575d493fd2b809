"""The glyph CLIP: open_clip's class, trained by its script, and registered by name."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from open_clip import build_zero_shot_classifier
from open_clip.model import CLIP
from safetensors import safe_open
from torch.nn import functional as F

from slora.demo import pretrain_clip
from slora.demo.captions import DIGITS, TEMPLATES, VOCABULARY, GlyphTokenizer
from slora.demo.glyph_clip import CLIP_CHECKPOINT, HELD_OUT_FONTS, TRAINING_FONTS, build_clip, load_clip
from slora.demo.letters import CLASSES, FONTS, styled_letters
from slora.demo.pretrain_clip import Pretraining, contrastive_loss, main
from slora.errors import CheckpointError, ConfigError
from slora.sources import models as sources


def test_the_model_is_open_clips_own_with_36_blocks_in_its_image_tower() -> None:
    model = build_clip()
    assert type(model) is CLIP
    images, tokens = torch.rand(2, 3, 16, 16), torch.zeros(2, 16, dtype=torch.int64)
    assert model.encode_image(images).shape == model.encode_text(tokens).shape == (2, 64)
    assert sum(name.startswith("visual.") and name.endswith("in_proj_weight") for name in model.state_dict()) == 6


def test_the_fonts_of_the_test_are_not_trained_on() -> None:
    assert not set(HELD_OUT_FONTS) & set(TRAINING_FONTS)
    assert set(HELD_OUT_FONTS) | set(TRAINING_FONTS) == set(FONTS)


def test_the_loss_spreads_its_targets_over_all_true_pairs() -> None:
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(4, 5, dtype=torch.float64), dim=1) for _ in range(2))
    true = torch.eye(4, dtype=torch.bool)
    true[0, 2] = true[1, 2] = True
    expected = 0.0
    for one, other, pairs in ((images, texts, true), (texts, images, true.T)):
        for i in range(4):
            logits = [3.0 * float(one[i] @ other[j]) for j in range(4)]
            total = math.log(sum(math.exp(value) for value in logits))
            positives = [j for j in range(4) if pairs[i, j]]
            expected += sum(total - logits[j] for j in positives) / len(positives) / 4 / 2
    assert contrastive_loss(images, texts, torch.tensor(3.0), true).item() == pytest.approx(expected, rel=1e-12)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_clip, "PER_CLASS", 1)
    monkeypatch.setattr(pretrain_clip, "TEST_PER_CLASS", 1)
    monkeypatch.setattr(pretrain_clip, "DIGIT_STEPS", 2)


@pytest.mark.usefixtures("few")
def test_a_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight = Pretraining(3, seed=0)
    losses = [straight.train_step() for _ in range(3)]
    first, second = Pretraining(3, seed=0), Pretraining(3, seed=0)
    first.train_step()
    first.save(tmp_path / "state.safetensors")
    second.load(tmp_path / "state.safetensors")
    assert [second.train_step() for _ in range(2)] == losses[1:]
    for name, value in straight.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


@pytest.mark.usefixtures("few")
def test_words_that_no_caption_holds_keep_their_embedding() -> None:
    training = Pretraining(2, seed=0)
    before = training.model.token_embedding.weight.detach().clone()
    training.train_step()
    tokens = pretrain_clip._TOKENIZE(["seven 7 photo"])[0]
    same = (training.model.token_embedding.weight == before).all(1)[tokens[1:4]]
    assert same.tolist() == [True, True, False]


@pytest.mark.usefixtures("few")
def test_digits_are_learnt_by_their_own_embeddings_alone() -> None:
    model = Pretraining(1, seed=0).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pretrain_clip.learn_digits(model, seed=0)
    after = model.state_dict()
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == ["token_embedding.weight"]
    changed = (after["token_embedding.weight"] != before["token_embedding.weight"]).any(1).nonzero().flatten().tolist()
    # Two steps draw one of the two names of each digit twice for each of two captions.
    assert {VOCABULARY[i] for i in changed} <= {word for pair in DIGITS for word in pair}
    assert len(changed) >= 10


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    Pretraining(3, seed=1).save(tmp_path / "state.safetensors")
    with pytest.raises(ConfigError, match="of a training with steps=3 and seed=1"):
        Pretraining(3, seed=0).load(tmp_path / "state.safetensors")


@pytest.mark.usefixtures("few")
def test_the_script_writes_what_load_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "clip.safetensors"
    main(["--steps", "1", "--out", str(out), "--state", str(tmp_path / "state.safetensors")])
    assert f"wrote {out}" in capsys.readouterr().out
    trained = Pretraining(1, seed=0)
    trained.train_step()
    pretrain_clip.learn_digits(trained.model, seed=0)
    model = load_clip(out)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.half().float()), name
    assert not model.training


@pytest.mark.parametrize(("flag", "value"), [("steps", "0"), ("seed", "-1")])
def test_pretraining_names_the_bad_argument(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([f"--{flag}", value])
    assert f"{flag}={value}" in capsys.readouterr().err


def test_a_missing_checkpoint_is_named_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.safetensors does not exist.*slora\.demo\.pretrain_clip"):
        load_clip(tmp_path / "absent.safetensors")


def test_the_shipped_file_is_small_and_in_half_precision() -> None:
    assert CLIP_CHECKPOINT.stat().st_size <= 3_000_000
    with safe_open(CLIP_CHECKPOINT, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
        assert set(file.keys()) == set(build_clip().state_dict())
        assert set(file.metadata()) == {"seed", "steps", "accuracy", "accuracy_training_fonts"}


def test_the_shipped_model_reads_new_letters_as_well_as_it_records() -> None:
    with safe_open(CLIP_CHECKPOINT, framework="pt") as file:
        recorded = float(file.metadata()["accuracy"])
    styled = styled_letters(2, seed=21, fonts=HELD_OUT_FONTS)
    reached = pretrain_clip.zero_shot_accuracy(load_clip(), styled.images, styled.labels)
    # Three standard deviations of a share of 104 images.
    assert reached >= recorded - 3 * math.sqrt(recorded * (1 - recorded) / len(styled.labels))


@torch.no_grad()
def test_the_shipped_model_tells_digits_apart_by_their_names() -> None:
    model = load_clip()
    for names in zip(*DIGITS, strict=True):
        digits = build_zero_shot_classifier(model, GlyphTokenizer(), names, TEMPLATES)
        letters = build_zero_shot_classifier(model, GlyphTokenizer(), CLASSES, TEMPLATES)
        largest = [(each.T @ each - 2 * torch.eye(each.shape[1])).max().item() for each in (digits, letters)]
        # No pair of digits is nearer than the nearest pair of letters, such as O and o.
        assert largest[0] < largest[1]


def test_it_is_built_by_name() -> None:
    clip = sources.build_clip("demo/glyph_clip", pretrained=True)
    assert torch.equal(clip.model.visual.proj, load_clip().visual.proj)
    assert clip.input.channels == 3
    tokens = clip.tokenizer([template.format("g") for template in clip.templates])
    assert clip.model.encode_text(tokens).shape == (len(clip.templates), 64)
    built = sources.build("demo/glyph_clip", 10)
    assert built.model(torch.rand(2, 3, 16, 16)).shape == (2, 10)


def test_arguments_of_the_model_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"demo/glyph_clip takes no arguments .* but img_size=32, layers=3 was given"):
        sources.build_clip("demo/glyph_clip", img_size=32, model_args={"layers": 3})
