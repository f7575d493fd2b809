"""`SelectiveLoRAConfig`: checked when it is made, and the same after a trip through JSON."""

from __future__ import annotations

import collections
import dataclasses
import enum
import fractions
import json
import math
import types
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slora
from slora.config import scaling
from slora.errors import ConfigError

Config = slora.SelectiveLoRAConfig


def test_defaults_are_the_documented_ones() -> None:
    assert dataclasses.asdict(Config()) == {
        "r": 16,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "exclude_modules": None,
        "modules_to_save": None,
        "rank_pattern": None,
        "alpha_pattern": None,
        "use_rslora": False,
        "threshold": 0.1,
        "gate_init": 0.15,
        "blocks": "auto",
        "inactive": "probe",
        "probe_every": 10,
        "probe_rows": 512,
        "base_dtype": None,
    }


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": ({"r": 0}, "r=0 is not a rank; use an integer from 1 to 256"),
    "rank 257": ({"r": 257}, "r=257 is not a rank"),
    "rank 1.5": ({"r": 1.5}, "r=1.5 is not a rank"),
    "rank True": ({"r": True}, "r=True is not a rank"),
    "rank text": ({"r": "8"}, "r='8' is not a rank"),
    "rank of a pattern": ({"rank_pattern": {"qkv": 0}}, "rank_pattern['qkv']=0 is not a rank"),
    "alpha 0": ({"lora_alpha": 0}, "lora_alpha=0 is not a positive finite number"),
    "alpha inf": ({"lora_alpha": math.inf}, "lora_alpha=inf"),
    "alpha text": ({"lora_alpha": "16"}, "lora_alpha='16' is not a positive finite number"),
    "alpha of a pattern": ({"alpha_pattern": {"qkv": -1}}, "alpha_pattern['qkv']=-1"),
    "dropout 1": ({"lora_dropout": 1.0}, "lora_dropout=1.0 is not a probability below 1"),
    "dropout negative": ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
    "dropout nan": ({"lora_dropout": math.nan}, "lora_dropout=nan"),
    "dropout text": ({"lora_dropout": "0.1"}, "lora_dropout='0.1' is not a probability below 1"),
    "threshold nan": ({"threshold": math.nan}, "threshold=nan is not a finite number"),
    "threshold text": ({"threshold": "0.1"}, "threshold='0.1' is not"),
    "gate_init inf": ({"gate_init": math.inf}, "gate_init=inf is not a finite number"),
    "nothing to train": (
        {"inactive": "frozen", "gate_init": 0.05},
        "gate_init=0.05 is below threshold=0.1, so that under inactive='frozen' every block would be off from the "
        "start and for good; raise gate_init to 0.1 or more, or use inactive='probe'",
    ),
    "blocks 0": ({"blocks": 0}, 'blocks=0 is neither a positive integer nor "auto"'),
    "blocks text": ({"blocks": "many"}, "blocks='many' is neither"),
    "blocks True": ({"blocks": True}, "blocks=True is neither"),
    "policy": ({"inactive": "asleep"}, "inactive='asleep' is unknown; use one of exact, probe, frozen"),
    "probe_every": ({"probe_every": 0}, "probe_every=0 is not a positive integer"),
    "probe_rows": ({"probe_rows": 2.5}, "probe_rows=2.5 is not a positive integer"),
    "integer dtype": ({"base_dtype": torch.int8}, "base_dtype=torch.int8 is not a floating-point torch.dtype"),
    "8-bit dtype": (
        {"base_dtype": torch.float8_e4m3fn},
        "base_dtype=torch.float8_e4m3fn is not a floating-point torch",
    ),
    "dtype as text": ({"base_dtype": "bfloat16"}, "base_dtype='bfloat16' is not a floating-point torch.dtype"),
    "regex": ({"target_modules": "blocks.(0"}, "target_modules: 'blocks.(0' is not a regular expression"),
    "exclude regex": ({"exclude_modules": "*"}, "exclude_modules: '*' is not a regular expression"),
    "pattern regex": ({"rank_pattern": {"(": 4}}, "rank_pattern: '(' is not a regular expression"),
    "ranks in a list": ({"rank_pattern": [1]}, "rank_pattern=[1] is not a mapping from patterns to numbers, such as"),
    "alphas in text": ({"alpha_pattern": "qkv=8"}, "alpha_pattern='qkv=8' is not a mapping"),
    "a number as pattern": ({"rank_pattern": {1: 4}}, "rank_pattern holds 1, which is not a regular expression"),
    "no target": ({"target_modules": []}, "target_modules is empty"),
    "a list of numbers": ({"target_modules": [1]}, "target_modules holds 1, which is not a name"),
    "names of numbers": ({"target_modules": 5}, "target_modules=5 is neither a string nor a list of names"),
    "names in a mapping": ({"exclude_modules": {"fc": 1}}, "exclude_modules={'fc': 1} is neither a string nor a list"),
    "keys of a mapping": ({"target_modules": {"0": 1}}, "; for its keys alone write target_modules=['0']"),
    "names in bytes": ({"target_modules": b"fc"}, "target_modules=b'fc' is neither"),
    "an empty set": ({"target_modules": set()}, "target_modules is empty"),
    "modules to save in a number": ({"modules_to_save": 1}, "modules_to_save=1 is not a list of names"),
    "rank np.True_": ({"r": np.True_}, "r=True is not a rank"),
    "rank of a bool tensor": ({"r": torch.tensor(True)}, "r=True is not a rank"),
    "rank np.float32": ({"r": np.float32(4)}, "r=4.0 is not a rank"),
    "rank of two": ({"r": torch.tensor([4, 4])}, "r=tensor([4, 4]) is not a rank"),
    "alpha True": ({"lora_alpha": True}, "lora_alpha=True is not a positive finite number"),
    "alpha beyond floats": ({"lora_alpha": 10**400}, "lora_alpha=<an integer of 1329 bits> is not a positive finite"),
    "gate beyond text": ({"gate_init": 10**5000}, "gate_init=<an integer of 16610 bits> is not a finite number"),
    "rank beyond text": ({"r": -(10**5000)}, "r=<an integer of 16610 bits> is not a rank"),
    "probe_every beyond text": ({"probe_every": 10**5000}, "probe_every=<an integer of 16610 bits> is not a positive"),
    "blocks beyond text": ({"blocks": -(10**5000)}, "blocks=<an integer of 16610 bits> is neither"),
    "dropout False": ({"lora_dropout": False}, "lora_dropout=False is not a probability"),
    "threshold True": ({"threshold": True}, "threshold=True is not a finite number"),
    "probe_every True": ({"probe_every": True}, "probe_every=True is not a positive integer"),
    "rslora 1": ({"use_rslora": 1}, "use_rslora=1 is neither True nor False"),
    "rslora text": ({"use_rslora": "no"}, "use_rslora='no' is neither True nor False"),
    "policy None": ({"inactive": None}, "inactive=None is unknown"),
    "policy in a list": ({"inactive": ["probe"]}, "inactive=['probe'] is unknown"),
    "one module to save": ({"modules_to_save": "head"}, """modules_to_save='head' is a string; use a list: ["head"]"""),
}


@pytest.mark.parametrize("case", BAD)
def test_a_value_that_cannot_work_is_refused_with_its_name_and_what_is_allowed(case: str) -> None:
    fields, message = BAD[case]
    with pytest.raises(ConfigError) as raised:
        Config(**fields)
    assert message in str(raised.value)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("policy", ["exact", "probe"])
def test_blocks_may_start_inactive_where_they_can_come_back(policy: Any) -> None:
    assert Config(inactive=policy, gate_init=0.05).gate_init == 0.05
    assert Config(inactive="frozen", gate_init=0.1).gate_init == 0.1


# Values as they come, and what they are in a config.
ANY: dict[str, tuple[str, Any, Any]] = {
    "set": ("target_modules", {"qkv", "fc1"}, ["fc1", "qkv"]),
    "frozenset": ("target_modules", frozenset({"qkv", "fc1"}), ["fc1", "qkv"]),
    "tuple": ("target_modules", ("qkv", "fc1"), ["qkv", "fc1"]),
    "keys": ("target_modules", {"qkv": 1, "fc1": 2}.keys(), ["qkv", "fc1"]),
    "array": ("target_modules", np.array(["qkv", "fc1"]), ["qkv", "fc1"]),
    "a name of NumPy": ("target_modules", np.str_("all-linear"), "all-linear"),
    "excluded set": ("exclude_modules", {"qkv", "fc1"}, ["fc1", "qkv"]),
    "saved set": ("modules_to_save", {"norm", "head"}, ["head", "norm"]),
    "saved keys": ("modules_to_save", {"norm": 1, "head": 2}.keys(), ["norm", "head"]),
    "ranks": ("rank_pattern", {np.str_("qkv"): np.int64(4), "fc1": torch.tensor(8)}, {"qkv": 4, "fc1": 8}),
    "ordered": ("rank_pattern", collections.OrderedDict(qkv=4), {"qkv": 4}),
    "view": ("rank_pattern", types.MappingProxyType({"qkv": 4}), {"qkv": 4}),
    "alphas": ("alpha_pattern", {"qkv": np.float32(0.5), "fc1": np.float16(2)}, {"qkv": 0.5, "fc1": 2.0}),
    "r np.int64": ("r", np.int64(4), 4),
    "r np.uint8": ("r", np.uint8(4), 4),
    "r array": ("r", np.array(4), 4),
    "r tensor": ("r", torch.tensor(4), 4),
    "r enum": ("r", enum.IntEnum("Rank", {"FOUR": 4})(4), 4),
    "alpha np.float32": ("lora_alpha", np.float32(0.1), float(np.float32(0.1))),
    "alpha np.int32": ("lora_alpha", np.int32(8), 8),
    "alpha tensor": ("lora_alpha", torch.tensor(0.25), 0.25),
    "alpha fraction": ("lora_alpha", fractions.Fraction(1, 4), 0.25),
    "alpha long": ("lora_alpha", np.longdouble(0.25), 0.25),
    "dropout": ("lora_dropout", np.float64(0.5), 0.5),
    "dropout of bf16": ("lora_dropout", torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    "rslora": ("use_rslora", np.True_, True),
    "rslora tensor": ("use_rslora", torch.tensor(True), True),
    "threshold": ("threshold", np.float16(0.125), 0.125),
    "gate_init": ("gate_init", np.float64(0.5), 0.5),
    "blocks": ("blocks", np.int16(2), 2),
    "blocks text": ("blocks", np.str_("auto"), "auto"),
    "inactive": ("inactive", np.str_("exact"), "exact"),
    "probe_every": ("probe_every", torch.tensor(3), 3),
    "probe_rows": ("probe_rows", np.uint16(7), 7),
}


def _types(value: Any) -> Any:
    if isinstance(value, dict):
        return type(value), [(type(key), type(entry)) for key, entry in value.items()]
    return type(value), [type(entry) for entry in value] if isinstance(value, list) else None


@pytest.mark.parametrize("case", ANY)
def test_collections_and_numbers_of_any_library_become_plain_ones(case: str) -> None:
    field, given, plain = ANY[case]
    config = Config(**{field: given})
    assert config == Config(**{field: plain})
    assert _types(getattr(config, field)) == _types(plain)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert dataclasses.replace(config) == config


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save"])
def test_a_generator_of_names_is_read_once_and_kept(field: str) -> None:
    config = Config(**{field: (name for name in ("qkv", "fc1"))})
    assert getattr(config, field) == ["qkv", "fc1"]
    assert config == Config(**{field: ["qkv", "fc1"]})


def test_a_config_keeps_nothing_of_what_it_was_made_from() -> None:
    names, ranks = ["qkv"], {"qkv": 4}
    config = Config(target_modules=names, rank_pattern=ranks)
    names.append("fc1")
    ranks["fc1"] = 8
    assert config == Config(target_modules=["qkv"], rank_pattern={"qkv": 4})


def test_fields_of_a_config_of_peft_are_taken_as_they_are(vit: torch.nn.Module, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(r=4, target_modules=["qkv", "fc1"], exclude_modules=["fc2"], modules_to_save=["head"])
    shared = {f.name for f in dataclasses.fields(Config)} & {f.name for f in dataclasses.fields(peft.LoraConfig)}
    config = Config(**{name: getattr(theirs, name) for name in shared})
    slora.save_adapter(slora.inject(vit, config), tmp_path)
    assert Config.from_dict(json.loads((tmp_path / "selective.json").read_text())["config"]) == config


def _config(threshold: float, gate_init: float, inactive: Any, **fields: Any) -> slora.SelectiveLoRAConfig:
    gate_init = max(gate_init, threshold) if inactive == "frozen" else gate_init
    return Config(threshold=threshold, gate_init=gate_init, inactive=inactive, **fields)


names = st.text("abcxyz.019", min_size=1, max_size=8).filter(lambda s: not s.startswith("."))
configs = st.builds(
    _config,
    r=st.integers(1, 256),
    lora_alpha=st.floats(1e-3, 1e3),
    lora_dropout=st.floats(0, 0.99),
    target_modules=st.one_of(st.just("all-linear"), st.lists(names, min_size=1, max_size=3)),
    exclude_modules=st.one_of(st.none(), st.just(r".*\.fc\d"), st.lists(names, max_size=2)),
    modules_to_save=st.one_of(st.none(), st.lists(names, max_size=2)),
    rank_pattern=st.one_of(st.none(), st.dictionaries(names, st.integers(1, 256), max_size=2)),
    alpha_pattern=st.one_of(st.none(), st.dictionaries(names, st.floats(0.1, 9), max_size=2)),
    use_rslora=st.booleans(),
    threshold=st.floats(-2, 2),
    gate_init=st.floats(-2, 2),
    blocks=st.one_of(st.just("auto"), st.integers(1, 64)),
    inactive=st.sampled_from(["exact", "probe", "frozen"]),
    probe_every=st.integers(1, 1000),
    probe_rows=st.integers(1, 10**6),
    base_dtype=st.sampled_from([None, torch.bfloat16, torch.float16, torch.float32]),
)


@given(configs)
def test_a_config_survives_json(config: slora.SelectiveLoRAConfig) -> None:
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_scores_beyond_64_bits_are_scores() -> None:
    layer = slora.SelectiveLoRALinear(2, 2, r=1, gate_init=10**30, threshold=10**20)
    assert layer.gate.item() == pytest.approx(1e30)
    assert layer(torch.ones(1, 2)).isfinite().all()
    assert not slora.SelectiveLoRALinear(2, 2, r=1, threshold=10**20).activity().active


def test_tuples_become_lists_on_the_way() -> None:
    fields = Config(target_modules=("qkv",), modules_to_save=("head",)).to_dict()
    assert fields["target_modules"] == ["qkv"]
    assert fields["modules_to_save"] == ["head"]


def test_unknown_fields_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"unknown config fields \['bias', 'use_dora'\]; known are \['alpha_pattern'"):
        Config.from_dict({"use_dora": True, "bias": "none", "r": 4})


@pytest.mark.parametrize("name", ["nn", "no_such_dtype", "int8"])
def test_a_dtype_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="base_dtype="):
        Config.from_dict({"base_dtype": name})


@given(st.integers(1, 256), st.floats(1e-3, 1e3))
def test_scaling_is_that_of_peft(r: int, alpha: float) -> None:
    assert scaling(alpha, r, False) == alpha / r
    assert scaling(alpha, r, True) == alpha / math.sqrt(r)


def test_patterns_match_the_end_of_a_name_at_a_dot_and_the_first_one_counts() -> None:
    config = Config(r=2, lora_alpha=3, rank_pattern={"fc1": 4, r"mlp\.fc[12]": 5}, alpha_pattern={"qkv|proj": 7})
    assert [config.rank_of(n) for n in ("a.mlp.fc1", "a.mlp.fc2", "fc1", "a.xfc1", "a.fc1.b")] == [4, 5, 4, 2, 2]
    assert [config.alpha_of(n) for n in ("a.qkv", "proj", "a.proj", "in_proj", "fc1")] == [7, 7, 7, 3, 3]


def test_calls_take_numbers_of_any_library_as_configs_do(vit: torch.nn.Module) -> None:
    model = slora.inject(vit, Config(r=2))
    groups = slora.parameter_groups(model, lr=np.float32(0.5), gate_lr=np.float64(0.25), weight_decay=np.float16(0.125))
    assert [(type(g["lr"]), g["lr"]) for g in groups] == [(float, 0.5), (float, 0.25)]
    rate = torch.tensor(0.5)
    assert slora.parameter_groups(model, lr=rate)[0]["lr"] is rate
    own = slora.ProximalGates(slora.gates.gates(model), lr=np.float32(0.5), penalty=np.float32(0.25))
    assert {type(own.defaults[name]) for name in ("lr", "penalty")} == {float}
    budget = slora.selection.Budget(
        model, np.float32(0.5), np.int64(10), warmup=np.float32(0.25), settling=torch.tensor(0.5)
    )
    assert json.loads(json.dumps(budget.state_dict()))["warmup"] == 0.25
    slora.freeze_gates(model)
    assert slora.selection.Gates(model, torch.tensor(10), penalty=np.float32(2)).selection_weight == 2.0
    assert slora.retention.Distillation(model, torch.randn(4, 3, 16, 16), np.float32(2), batch_size=np.int64(2))
