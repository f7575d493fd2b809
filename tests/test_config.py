"""`SelectiveLoRAConfig`: checked when it is made, and the same after a trip through JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

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
    "dtype as text": ({"base_dtype": "bfloat16"}, "base_dtype='bfloat16' is not a floating-point torch.dtype"),
    "regex": ({"target_modules": "blocks.(0"}, "target_modules: 'blocks.(0' is not a regular expression"),
    "exclude regex": ({"exclude_modules": "*"}, "exclude_modules: '*' is not a regular expression"),
    "pattern regex": ({"rank_pattern": {"(": 4}}, "rank_pattern: '(' is not a regular expression"),
    "ranks in a list": ({"rank_pattern": [1]}, "rank_pattern=[1] is not a mapping from patterns to numbers, such as"),
    "alphas in text": ({"alpha_pattern": "qkv=8"}, "alpha_pattern='qkv=8' is not a mapping"),
    "a number as pattern": ({"rank_pattern": {1: 4}}, "rank_pattern holds 1, which is not a regular expression"),
    "no target": ({"target_modules": []}, "target_modules is empty"),
    "a list of numbers": ({"target_modules": [1]}, "target_modules holds 1, which is not a name"),
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
