"""Terms of retention in a run: which of them the settings make, what is recorded, and that a resume repeats them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slora.demo  # noqa: F401 (registers its model and data sets)
from slora import ConfigError, NonFiniteLossError
from slora.layers import adapted_layers
from slora.models.input_spec import InputSpec
from slora.report import write_report
from slora.retention import EWC, L2, Distillation, LocalDrift, Replay, Term
from slora.runs.metrics import read_metrics
from slora.runs.request import read_request
from slora.training import TrainSettings, prepare, train
from slora.training.make_terms import loss_terms
from slora.training.replay_images import replay_terms
from slora.training.run_model import rebuild

Factory = Callable[[], nn.Module]
Pair = tuple[Tensor, Tensor]
SPEC = InputSpec(1, 16, (0.0,), (1.0,), "bilinear")


def started(make_model: Factory, settings: TrainSettings) -> nn.Module:
    torch.manual_seed(11)
    model = prepare(make_model(), settings=settings)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.lora_B.normal_(std=0.3)
    return model


EACH: dict[str, dict[str, Any]] = {
    "distillation": {"retain_weight": 2.0},
    "drift": {"drift_penalty": 0.1, "log_drift": True},
    "l2": {"l2_penalty": 0.01},
    "ewc": {"ewc_penalty": 0.1},
    "all": {"retain_weight": 1.0, "drift_penalty": 0.1, "l2_penalty": 0.01, "ewc_penalty": 0.1},
    "replay": {},
}


@pytest.mark.parametrize("name", EACH)
def test_a_resumed_run_with_a_term_ends_bit_for_bit_where_the_uninterrupted_one_ends(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path, name: str
) -> None:
    settings = settings.replace(
        **{"budget": 2, "max_steps": 11, "save_every": 5, "keep_last": 9, "retain_weight": 0.0} | EACH[name]
    )
    more = (lambda model: [Replay(model, data[0][:20], data[1][:20], 0.5)]) if name == "replay" else None
    whole = started(make_model, settings)
    train(whole, data, None, settings, tmp_path / "a", retain=data[0][:20], terms=more)
    part = started(make_model, settings)
    start = tmp_path / "a" / "checkpoints" / "step-00000005"
    train(part, data, None, settings, tmp_path / "b", resume=start, retain=data[0][:20], terms=more)
    assert all(torch.equal(value, part.state_dict()[key]) for key, value in whole.state_dict().items())
    plain = started(make_model, settings)
    off = {key: 0.0 for key in EACH[name] if key != "log_drift"}
    train(plain, data, None, settings.replace(**off), retain=data[0][:20])
    assert not torch.equal(plain.get_parameter("third.lora_B"), whole.get_parameter("third.lora_B"))


def test_settings_make_their_terms(make_model: Factory, data: Pair, settings: TrainSettings) -> None:
    settings = settings.replace(**EACH["all"])
    model = started(make_model, settings)
    terms, drift = loss_terms(model, settings, data[0][:4], lambda n: (data[0][:n], data[1][:n]))
    assert [(type(term), term.weight) for term in terms] == [
        (Distillation, 1),
        (LocalDrift, 0.1),
        (L2, 0.01),
        (EWC, 0.1),
    ]
    assert drift is terms[1]
    assert loss_terms(model, settings.replace(**dict.fromkeys(EACH["all"], 0.0)), data[0], lambda n: data) == ([], None)
    # Without retained samples the drift is that on training images.
    terms, _ = loss_terms(model, settings.replace(ewc_penalty=0.0), None, lambda n: (data[0][:n], data[1][:n]))
    assert [type(term) for term in terms] == [LocalDrift, L2]


def test_the_log_has_the_value_of_each_term_and_the_drift_of_each_block(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    settings = settings.replace(**EACH["all"], budget=2, log_drift=True)
    train(started(make_model, settings), data, None, settings, tmp_path, retain=data[0][:20])
    records = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    assert all(set(r["retention"]) == {"distillation", "local drift", "l2", "ewc"} for r in records)
    assert all(math.isfinite(value) and value > 0 for r in records for value in r["retention"].values())
    for record in records:
        drifts = [value for values in record["drift"].values() for value in values]
        assert len(drifts) == record["blocks"]
        assert sum(value > 0 for value in drifts) == record["active"]
    (final,) = (record for record in read_metrics(tmp_path / "metrics.jsonl") if "feature_drift" in record)
    found = [value for values in final["feature_drift"].values() for value in values]
    assert (len(found), sum(value > 0 for value in found)) == (3, 2)
    page = write_report(tmp_path).read_text()
    assert "How far each block moves the model" in page
    assert all(name in page for name, values in records[-1]["drift"].items() if values[0])


def test_a_term_that_is_not_finite_ends_the_run_with_its_name(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    class Broken(Term):
        name = "broken"

        def value(self, draw: int) -> Tensor:
            return torch.tensor(math.nan if draw == 1 else 0.0)

    with pytest.raises(NonFiniteLossError, match="the loss term 'broken' is nan at or shortly before step 2"):
        train(started(make_model, settings), data, None, settings, terms=lambda model: [Broken(model, 1.0)])


@pytest.mark.parametrize(
    ("changes", "retain", "message"),
    [
        ({"ewc_penalty": 1.0}, False, "ewc_penalty=1 needs samples to find the important weights on"),
        ({"method": "full"}, True, "has no adapted layer, so the term 'distillation'"),
    ],
)
def test_a_term_without_what_it_needs_is_refused_before_anything_is_trained(
    make_model: Factory, data: Pair, settings: TrainSettings, changes: dict[str, Any], retain: bool, message: str
) -> None:
    settings = settings.replace(**changes)
    model = prepare(make_model(), settings=settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        train(model, data, None, settings, retain=data[0] if retain else None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["full", "linear"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("l2_penalty", 0.5), ("log_drift", True), ("retain_data", "generic"), ("replay_data", "letters")],
)
def test_a_method_without_blocks_is_refused(method: str, name: str, value: Any) -> None:
    said = re.escape(f"{name}={value!r} acts on LoRA blocks, but method={method!r} has none")
    with pytest.raises(ConfigError, match=said):
        TrainSettings(method=method, **{name: value})


@pytest.mark.parametrize("name", ["drift_penalty", "l2_penalty", "ewc_penalty", "replay_weight"])
@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
def test_a_weight_that_is_none_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value} is out of range; use a finite number from 0 up"):
        TrainSettings(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ewc_penalty": 1.0}, "ewc_penalty=1 needs images to find the important weights on"),
        ({"drift_data": "retained", "budget": 4}, "drift_data='retained' needs images; add some with --retain-data"),
        ({"replay_data": "lettters"}, "replay_data='lettters' is no data set with labels: .*near names are letters"),
    ],
)
def test_the_command_refuses_before_anything_is_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    overrides = {"model": "demo/letters_vit", "data": "digits", **changes}
    with pytest.raises(ConfigError, match=message):
        read_request(overrides, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_replayed_images_are_classified_by_the_pretrained_head() -> None:
    settings = TrainSettings(
        model="demo/letters_vit", pretrained=True, data="digits", replay_data="letters", replay_weight=0.5, r=2
    )
    make = replay_terms(settings, SPEC)
    assert make is not None
    model = prepare(rebuild(settings, 10).model, settings=settings)
    (term,) = make(model)
    assert isinstance(term, Replay)
    assert (len(term.samples), len(term.labels), term.weight) == (64, 64, 0.5)
    # The pretrained model knows letters.
    assert term.value(0).item() < 0.5


def test_replay_without_the_old_head_is_refused() -> None:
    settings = TrainSettings(model="demo/letters_vit", pretrained=True, data="digits", replay_data="digits")
    with pytest.raises(
        ConfigError, match="replay_data='digits' has 10 classes, and demo/letters_vit has no pretrained"
    ):
        replay_terms(settings, SPEC)
    with pytest.raises(
        ConfigError, match="replay_data='letters' has 52 classes, and demo/letters_vit has no pretrained"
    ):
        replay_terms(settings.replace(replay_data="letters", pretrained=False), SPEC)
    assert replay_terms(settings.replace(replay_weight=0.0), SPEC) is None
