"""Settings: what is refused, and what a YAML file and flags make of them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from slora import ConfigError
from slora.training import TrainSettings


def test_a_yaml_file_gives_settings_and_overrides_go_before_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-3\nbatch-size: 32\nmethod: lora\ntarget_modules: [qkv, fc1]\n")
    settings = TrainSettings.from_yaml(path, batch_size=16)
    assert (settings.lr, settings.batch_size, settings.method) == (1e-3, 16, "lora")
    assert settings.target_modules == ["qkv", "fc1"]
    assert settings.epochs == TrainSettings().epochs


def test_an_override_replaces_a_hyphenated_name_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("gate-lr: 0.5\n")
    assert TrainSettings.from_yaml(path, gate_lr=0.25).gate_lr == 0.25


def test_settings_survive_a_round_trip() -> None:
    settings = TrainSettings(model="timm/x", penalty=0.3, blocks=2, max_steps=7, modules_to_save=["head"])
    assert TrainSettings.from_dict(settings.to_dict()) == settings


def test_an_unknown_setting_is_named_with_near_names() -> None:
    with pytest.raises(ConfigError, match=r"'learnig_rate' is unknown|'penalti' is unknown.*'penalty'"):
        TrainSettings.from_dict({"penalti": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: [1, 2]", r"run\.yaml: lr=\[1, 2\] is not a number"),
        ("- a\n- b", r"run\.yaml holds a list; expected lines"),
        ("a: [", r"run\.yaml cannot be read as YAML"),
        ("epoch: 3", r"run\.yaml: setting 'epoch' is unknown; near names are 'epochs'"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        TrainSettings.from_yaml(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml does not exist"):
        TrainSettings.from_yaml(tmp_path / "absent.yaml")


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("")
    assert TrainSettings.from_yaml(path) == TrainSettings()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "epochs=0 is out of range; use 1 or more"),
        ("max_steps", 0, "max_steps=0"),
        ("batch_size", 2.5, "batch_size=2.5 is not an integer"),
        ("batch_size", True, "batch_size=True is not an integer"),
        ("lr", float("nan"), "lr=nan"),
        ("lr", "fast", "lr='fast' is not a number"),
        ("penalty", -1, "penalty=-1"),
        ("selection_warmup", 1.5, "use a share from 0 to 1"),
        ("selection_warmup", 0.7, "selection_warmup=0.7 and settling=0.333 are longer than the run"),
        ("settling", 0.2, "settling=0.2 is out of range; use a share from 1/3 to 1"),
        ("budget", -1, "budget=-1 blocks is out of range"),
        ("budget", 1.5, "budget=1.5 is a share"),
        ("budget", "many", "budget='many' is not a number or unset"),
        ("head_first", -1, "head_first=-1"),
        ("label_smoothing", 1.0, "label_smoothing=1.0"),
        ("method", "selectiv", "method='selectiv' is not 'selective', 'lora', 'full' or 'linear'"),
        ("inactive", "never", "inactive='never'"),
        ("pretrained", 1, "pretrained=1 is not true or false or a string"),
        ("r", 0, "r=0 is not a rank"),
        ("threshold", float("inf"), "threshold=inf is not"),
        ("target_modules", "(", "not a regular expression"),
        ("save_every", -1, "save_every=-1"),
        ("base_dtype", "float99", "base_dtype='float99' is not the name of a torch dtype"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(") if message == "(" else message):
        TrainSettings(**{field: value})


def test_16_bit_base_weights_need_16_bit_arithmetic() -> None:
    assert TrainSettings(base_dtype="bfloat16", precision="bf16").lora_config().base_dtype is torch.bfloat16
    with pytest.raises(ConfigError, match="base_dtype='bfloat16' needs precision='bf16'"):
        TrainSettings(base_dtype="bfloat16", precision="fp32")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("all-linear", "all-linear"),
        ("qkv", ["qkv"]),
        ("qkv, attn.proj", ["qkv", "attn.proj"]),
        (r".*\.(fc1|fc2)", r".*\.(fc1|fc2)"),
    ],
)
def test_target_modules_are_name_endings_or_a_regular_expression(given: str, kept: Any) -> None:
    assert TrainSettings(target_modules=given).target_modules == kept


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("qkv=8", {"qkv": 8}),
        (r"qkv=8, blocks\.[0-3]\.mlp\.fc2 = 32", {"qkv": 8, r"blocks\.[0-3]\.mlp\.fc2": 32}),
        ({"qkv": 8.0}, {"qkv": 8}),
        (None, None),
    ],
)
def test_ranks_of_some_layers_come_from_a_flag_or_a_mapping(given: Any, kept: Any) -> None:
    settings = TrainSettings(rank_pattern=given, alpha_pattern=given)
    assert settings.rank_pattern == settings.lora_config().rank_pattern == kept
    assert settings.lora_config().alpha_pattern == kept


@pytest.mark.parametrize("given", ["qkv", "qkv=high", "=8", {"qkv": 1.5}, ["qkv"], 8])
def test_ranks_of_some_layers_in_another_form_are_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"rank_pattern=.* is not a mapping such as qkv=8,fc2=32 or unset"):
        TrainSettings(rank_pattern=given)


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 2), (16, 4)])
def test_by_default_no_more_processes_read_images_than_there_are_cores(
    cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert TrainSettings().workers() == workers
    assert TrainSettings(num_workers=7).workers() == 7
    assert TrainSettings(num_workers=0).workers() == 0
    assert TrainSettings().to_dict()["num_workers"] is None, "a config file is for any machine"


def test_plain_lora_is_the_same_adapter_with_every_block_active_for_good() -> None:
    selective, lora = TrainSettings(r=3).lora_config(), TrainSettings(r=3, method="lora").lora_config()
    assert (lora.gate_init, selective.gate_init) == (1.0, 0.15)
    assert lora.threshold < -1e6
    assert dataclasses.replace(lora, gate_init=0.15, threshold=0.1) == selective


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("drop_path_rate=0.1,qk_norm=true", {"drop_path_rate": 0.1, "qk_norm": True}),
        ("init_values=1e-5, global_pool=avg", {"init_values": 1e-5, "global_pool": "avg"}),
        ("depth=3,class_token=null", {"depth": 3, "class_token": None}),
        ({"depth": 3, "init_values": "1e-5"}, {"depth": 3, "init_values": 1e-5}),
        (None, None),
    ],
)
def test_arguments_of_the_model_are_yaml_scalars(given: Any, meant: dict[str, Any] | None) -> None:
    settings = TrainSettings(model_args=given)
    assert settings.model_args == meant
    assert TrainSettings.from_dict(settings.to_dict()) == settings


@pytest.mark.parametrize(
    "given", ["depth", "=3", "depth=[3", "a b=3", "depth={a: 1}", "a=.nan", {"a": [1, 2]}, {3: 4}, 5]
)
def test_what_is_no_argument_of_a_model_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"model_args=.* is not arguments with scalar values, such as drop_path_rate"):
        TrainSettings(model_args=given)


def test_arguments_of_the_model_that_have_a_setting_of_their_own_are_refused() -> None:
    for key in ("pretrained", "num_classes", "img_size", "force_image_size"):
        with pytest.raises(ConfigError, match=f"model_args holds '{key}', which slora sets itself"):
            TrainSettings(model_args={"depth": 3, key: 1})
    with pytest.raises(ConfigError, match=r"img_size=0 is out of range; use 1 or more"):
        TrainSettings(img_size=0)


@pytest.mark.parametrize(
    ("field", "given", "kept"),
    [
        ("target_modules", {"qkv", "fc1"}, ["fc1", "qkv"]),
        ("target_modules", {"qkv": 1}.keys(), ["qkv"]),
        ("modules_to_save", (name for name in ("norm", "head")), ["norm", "head"]),
        ("rank_pattern", {"qkv": np.int64(4)}, {"qkv": 4}),
        ("r", np.int64(4), 4),
        ("lr", np.float32(0.5), 0.5),
        ("lr", torch.tensor(0.5), 0.5),
        ("budget", np.float64(0.5), 0.5),
        ("seed", torch.tensor(3), 3),
        ("use_rslora", np.True_, True),
    ],
    # Not of the values: a set has no order, a generator an address, and pytest-xdist compares.
    ids=["set", "keys", "generator", "pattern", "r", "lr of numpy", "lr of torch", "budget", "seed", "bool"],
)
def test_collections_and_numbers_of_any_library_become_plain_ones(field: str, given: Any, kept: Any) -> None:
    settings = TrainSettings(**{field: given})
    assert settings == TrainSettings(**{field: kept})
    assert type(getattr(settings, field)) is type(kept)
    assert TrainSettings.from_dict(yaml.safe_load(yaml.safe_dump(settings.to_dict()))) == settings
