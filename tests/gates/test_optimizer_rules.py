"""By which rule the optimizers of PyTorch, timm and transformers move gates, and which of them are named for it."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import slora
from slora.gates import optimizer_rules
from slora.gates.values import gates
from tests.gates.gated_models import step

# Every optimizer. Those of apex and bitsandbytes need a GPU.
OTHERWISE = {
    "LBFGS": (ValueError, "LBFGS doesn't support per-parameter options"),
    "Muon": (ValueError, "Muon only supports 2D parameters"),
    "SparseAdam": (RuntimeError, "SparseAdam does not support dense gradients"),
    "timm adahessian": (RuntimeError, "does not require grad"),
}


def _all_optimizers() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    found: dict[str, Any] = {
        name: kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    try:
        from timm import optim
    except ImportError:
        return found
    for name in optim.list_optimizers():
        if not name.startswith(("bnb", "fused")):
            found[f"timm {name}"] = functools.partial(optim.create_optimizer_v2, opt=name, lr=1e-2)
    return found


EVERY = _all_optimizers()


# Some of timm compile their steps, which takes a minute.
@torch.compiler.set_stance("force_eager")
@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_steps_over_the_groups_and_moves_gates_by_their_gradients_or_is_named(
    name: str, make_mlp: Any
) -> None:
    config = slora.SelectiveLoRAConfig(r=2, target_modules=["fc0", "fc1"], modules_to_save=["fc2"])
    model = slora.inject(make_mlp(6, 6, 6, 6), config)
    if name in OTHERWISE:
        error, text = OTHERWISE[name]
        with pytest.raises(error, match=text):
            step(model, EVERY[name](slora.parameter_groups(model)))
        return
    optimizer = EVERY[name](slora.parameter_groups(model, gate_lr=0.1))
    texts = step(model, optimizer)
    if texts:
        assert "does not know the rule by which" in texts[0]
        assert "gate_lr=None" in texts[0]
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin = copy.deepcopy(model)
    again = EVERY[name](slora.parameter_groups(twin))
    again.load_state_dict(torch.load(buffer, weights_only=True))
    torch.manual_seed(0)
    step(model, optimizer)
    torch.manual_seed(0)
    step(twin, again)
    for (key, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs), key
        assert ours.isfinite().all(), key
    if not texts:
        optimizer.state.clear()
        _assert_in_proportion(model, optimizer)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD"])
def test_known_rules_of_torch_move_a_gate_by_its_gradient(name: str, model: nn.Module) -> None:
    optimizer = getattr(torch.optim, name)(slora.parameter_groups(model, gate_lr=0.1))
    _assert_in_proportion(model, optimizer)


@pytest.mark.parametrize(
    "name",
    "adam adamw adamwlegacy adamax adamp laprop muon nadam nadamw nadamlegacy radam radamlegacy rmsprop sgd momentum "
    "sgdw sgdp".split(),
)
def test_known_rules_of_timm_move_a_gate_by_its_gradient(name: str, model: nn.Module) -> None:
    optim = pytest.importorskip("timm.optim")
    if name not in optim.list_optimizers():
        pytest.skip(f"this timm has no optimizer {name}")
    optimizer = optim.create_optimizer_v2(slora.parameter_groups(model, gate_lr=0.1), opt=name, lr=0.1)
    _assert_in_proportion(model, optimizer)


def _assert_in_proportion(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    slopes = (1e-3, -2e-2)
    for _ in range(8):
        before = [parameter.item() for parameter in gates(model)]
        for parameter, slope in zip(gates(model), slopes, strict=True):
            parameter.grad = torch.full_like(parameter, slope)
        with warnings.catch_warnings():
            warnings.simplefilter("error", slora.GateRuleWarning)
            optimizer.step()
        for parameter, value, slope in zip(gates(model), before, slopes, strict=True):
            # Within 3 %: eps = 1 beside a gradient of 0.02, or the root of its average.
            assert value - parameter.item() == pytest.approx(0.1 * slope, rel=0.03)


def test_timm_trains_gates_by_its_adamw_of_the_model_and_by_the_groups(vit: nn.Module) -> None:
    optim = pytest.importorskip("timm.optim")
    model = slora.inject(vit, slora.SelectiveLoRAConfig(r=2))
    x = torch.randn(2, 3, 16, 16)
    groups = optim.create_optimizer_v2(slora.parameter_groups(model), opt="adamw", lr=1e-3, weight_decay=0.05)
    assert step(model, groups, inputs=x) == []
    (text,) = step(model, optim.create_optimizer_v2(model, opt="adamw", lr=1e-3), inputs=x)
    assert "AdamW moves every gate by about lr=0.001" in text


def test_gate_rule_says_nothing_of_a_group_without_settings() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert optimizer_rules.rule_problem(optimizer, {}) is None
    group: dict[str, Any] = {}
    optimizer_rules.make_readable(optimizer, group)
    assert group == {}


@pytest.mark.once
@pytest.mark.parametrize("how", ["default", "optimizers", "override", "schedule"])
def test_the_trainer_of_transformers(how: str, families: Any, tmp_path: Any, monkeypatch: Any) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    model = slora.inject(families["bert"].build(), slora.SelectiveLoRAConfig(r=2))
    rows = [{"input_ids": torch.randint(1, 40, (9,)), "labels": torch.tensor(i % 3)} for i in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
        lr_scheduler_type="linear" if how in ("default", "schedule") else "constant",
    )  # fmt: skip

    class Trainer(transformers.Trainer):  # type: ignore[misc]
        def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
            self.optimizer = torch.optim.AdamW(slora.parameter_groups(self.model, lr=self.args.learning_rate))
            return self.optimizer

    optimizers = (torch.optim.AdamW(slora.parameter_groups(model)), None) if how == "optimizers" else (None, None)
    kind = Trainer if how in ("override", "schedule") else transformers.Trainer
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kind(model, arguments, train_dataset=rows, optimizers=optimizers).train()
    texts = [str(w.message) for w in caught if issubclass(w.category, slora.GateRuleWarning)]
    expected = {"default": "AdamW moves every gate", "schedule": "a schedule has changed the rate of the gates"}
    assert len(texts) == (how in expected)
    assert all(text.startswith(expected[how]) for text in texts)
