"""Copies of an adapted model: averages of weights, deepcopy, pickles and state dicts, each right by itself."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import slora
from slora.gates.values import gates
from slora.layers import adapted_layers
from slora.selection.strategy import active_strategy

CONFIG = slora.SelectiveLoRAConfig(r=2, target_modules=["fc0", "fc1"], modules_to_save=["fc2"])


@pytest.fixture
def build(make_mlp: Any, randomise: Any) -> Callable[[], nn.Module]:
    """Return a builder of a model with two blocks, both on."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return randomise(slora.inject(make_mlp(6, 6, 6, 3), CONFIG))  # type: ignore[no-any-return]

    return made


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 6)


def by_hand(model: nn.Module, x: Tensor) -> Tensor:
    """The output of `model` from its tensors alone."""
    for i in range(3):
        layer = model.get_submodule(f"fc{i}")
        y = x @ layer.weight.T + layer.bias
        if i < 2 and layer.gate.item() >= layer.threshold:
            y = y + layer.scaling * x @ layer.lora_A[0].T @ layer.lora_B[0].T
        x = torch.tanh(y)
    return x


def actives(model: nn.Module) -> list[bool]:
    return [bool(flags.item()) for flags in slora.active_blocks(model).values()]


def _timm(name: str, **settings: Any) -> Any:
    def make(model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], None]]:
        ema = getattr(pytest.importorskip("timm.utils"), name)(model, decay=0.5, **settings)
        return ema, ema.update

    return make


def _torch(**settings: Any) -> Any:
    def make(model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], None]]:
        average = AveragedModel(model, **settings)
        return average, average.update_parameters

    return make


AVERAGES = {
    "ModelEmaV2": _timm("ModelEmaV2"),
    "ModelEmaV3": _timm("ModelEmaV3"),
    "ModelEmaV3 foreach": _timm("ModelEmaV3", foreach=True),
    "AveragedModel": _torch(),
    "AveragedModel of buffers": _torch(use_buffers=True),
    "EMA of torch": _torch(multi_avg_fn=get_ema_multi_avg_fn(0.5)),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_of_weights_runs_reports_and_saves_its_own_gates(
    name: str, build: Any, x: Tensor, make_mlp: Any, tmp_path: Any
) -> None:
    model = build()
    average, update = AVERAGES[name](model)
    update(model)
    assert actives(average) == [True, True]
    average(x)
    with torch.no_grad():
        gates(model)[0].fill_(-5.0)
    for _ in range(3):
        update(model)
        torch.testing.assert_close(average(x), by_hand(average.module, x))
    assert actives(average) == [False, True]
    assert actives(model) == [False, True]
    slora.save_adapter(average, tmp_path)
    torch.manual_seed(0)
    torch.testing.assert_close(slora.load_adapter(make_mlp(6, 6, 6, 3), tmp_path)(x), average(x))


COPIED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),  # type: ignore[no-any-return]
    "torch.save": lambda model: _saved(model),
}


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", COPIED)
def test_a_copy_and_its_original_train_apart(how: str, build: Any, x: Tensor) -> None:
    model = build()
    model(x)
    twin = COPIED[how](model)
    for m, penalty in ((model, 0.0), (twin, 5.0)):
        optimizer = torch.optim.AdamW(slora.parameter_groups(m, lr=1e-2, gate_lr=0.1))
        for _ in range(2):
            (m(x).square().mean() + penalty * slora.gate_penalty(m)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert actives(model) == [True, True]
    assert actives(twin) == [False, False]
    for m in (model, twin):
        torch.testing.assert_close(m(x), by_hand(m, x))


@pytest.mark.parametrize("how", COPIED)
def test_a_copy_of_a_merged_model_is_unmerged_by_itself(how: str, build: Any, x: Tensor) -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = COPIED[how](slora.merge(model))
    slora.unmerge(twin)
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
    assert all(layer.merged for _, layer in adapted_layers(model))


@pytest.mark.parametrize("how", COPIED)
def test_a_strategy_stays_with_the_original(how: str, build: Any) -> None:
    model = build()
    budget = slora.selection.Budget(model, 1, steps=2, warmup=0.0, settling=0.5)
    twin = COPIED[how](model)
    assert active_strategy(model) is budget
    assert active_strategy(twin) is None
    for _ in range(2):
        budget.step()
    assert sum(actives(model)) == 1
    assert sum(actives(twin)) == 2


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_state_dict_brings_its_gates(assign: bool, build: Any, x: Tensor) -> None:
    model, other = build(), build()
    model(x)
    with torch.no_grad():
        gates(other)[0].fill_(-1.0)
        gates(other)[1].fill_(3.0)
    model.load_state_dict(other.state_dict(), strict=True, assign=assign)
    assert actives(model) == [False, True]
    torch.testing.assert_close(model(x), by_hand(other, x))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, p in other.named_parameters() if p.requires_grad
    }


def test_tied_and_shared_parts_stand_once_in_the_groups_and_make_the_round_trip(x: Tensor, tmp_path: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.saved, self.again = (nn.Linear(6, 6) for _ in range(4))
            self.again.weight = self.saved.weight
            self.shared = self.twice = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            for part in (self.a, self.b, self.shared, self.twice, self.saved, self.again):
                x = part(x)
            return x

        def tie(self) -> Tied:
            self.b.weight = self.a.weight
            return self

    base = Tied()
    model: Any = slora.inject(
        copy.deepcopy(base), slora.SelectiveLoRAConfig(r=2, target_modules=["a", "shared"], modules_to_save=["saved"])
    ).tie()
    assert model.shared is model.twice
    held = [p for group in slora.parameter_groups(model) for p in group["params"]]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    with torch.no_grad():
        for p in held:
            p.add_(torch.randn_like(p) * 0.1).abs_()
    slora.save_adapter(model, tmp_path)
    # Only inject refuses a layer that is tied: an adapter of one is loaded.
    torch.testing.assert_close(slora.load_adapter(base.tie(), tmp_path)(x), model(x))
