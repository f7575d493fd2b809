"""What was adapted and has no part in the model any more is named: replaced, fused, pruned or never trained."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import slora
from slora.errors import StateError
from slora.layers import adapted_layers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.cross = nn.Linear(8, 8)
        self.qk: nn.Linear | None = None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q, k = (self.q(x), self.k(x)) if self.qk is None else self.qk(x).chunk(2, -1)
        x = self.proj(torch.tanh(q) * k)
        return x if other is None else x + self.cross(other)

    def fuse(self) -> None:
        self.qk = nn.Linear(8, 16)
        self.qk.load_state_dict(
            {key: torch.cat([getattr(self.q, key), getattr(self.k, key)]).detach() for key in ("weight", "bias")}
        )


def trained(cross: bool = True, steps: int = 1) -> nn.Sequential:
    model = slora.inject(nn.Sequential(Attention()), slora.SelectiveLoRAConfig(r=2))
    optimizer = torch.optim.SGD(slora.parameter_groups(model, lr=0.1, gate_lr=None))
    for _ in range(steps):
        x = torch.randn(3, 8)
        model[0](x, x if cross else None).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


CALLS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "save": slora.save_adapter,
    "merge": lambda model, _: slora.merge(model),
    "merge_and_unload": lambda model, _: slora.merge_and_unload(model),
}


AT_FIRST = (
    r"^1 adapted and active layer got no gradient for the first optimizer step: '0.cross'\. No forward .*exclude_mod"
)


@pytest.mark.parametrize("call", CALLS)
def test_layers_that_no_forward_reached_are_named_once_at_the_first_step(call: str, tmp_path: Path) -> None:
    with pytest.warns(slora.UntrainedLayerWarning, match=AT_FIRST) as seen:  # noqa: PT031
        model = trained(cross=False, steps=2)
        CALLS[call](model, tmp_path)
    assert len(seen) == 1
    assert seen[0].filename == __file__


@pytest.mark.parametrize("call", CALLS)
def test_layers_that_another_process_left_untrained_are_named_once(call: str, tmp_path: Path) -> None:
    with pytest.warns(slora.UntrainedLayerWarning, match=AT_FIRST):
        model = copy.deepcopy(trained(cross=False))
    with pytest.warns(slora.UntrainedLayerWarning, match=r"^'0.cross' was adapted and active, but not trained") as seen:  # noqa: PT031
        CALLS[call](model, tmp_path)
        if call == "save":
            slora.save_adapter(model, tmp_path)
    assert len(seen) == 1
    assert seen[0].filename == __file__


def test_what_is_trained_in_inactive_blocks_does_not_count() -> None:
    config = slora.SelectiveLoRAConfig(r=2, blocks=2)
    model = slora.inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config)
    with torch.no_grad():
        model[0].lora_B.fill_(1.0)
        model[1].lora_B[1].fill_(1.0)
        model[1].gate[1] = 0.0
    with pytest.warns(slora.UntrainedLayerWarning, match=r"^'1' was adapted and active, but not trained"):
        slora.merge(model)


class Reads(nn.Module):
    """Reads its layer in ways that no scan of its forward finds."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.q, self.out, self.how = nn.Linear(8, 8), nn.Linear(8, 8), how
        self.kept = [self.q.weight]

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "kept":
            return self.out(nn.functional.linear(x, self.kept[0]))
        if self.how == "by name":
            return self.out(nn.functional.linear(x, getattr(self.q, "weight")))  # noqa: B009
        if self.how == "get_parameter":
            return self.out(nn.functional.linear(x, self.get_parameter("q.weight")))
        return self.out(x)


@pytest.mark.parametrize("how", ["kept", "by name", "get_parameter", "from outside"])
def test_reads_that_are_not_seen_are_named_at_the_first_step_and_not_again(how: str) -> None:
    model = slora.inject(Reads(how), slora.SelectiveLoRAConfig(r=2, target_modules=["q", "out"]))
    optimizer = torch.optim.SGD(slora.parameter_groups(model))
    with pytest.warns(slora.UntrainedLayerWarning, match=r"step: 'q'\. .*read `self.<layer>.weight` in the fo") as seen:  # noqa: PT031
        for _ in range(2):
            y = model(torch.randn(3, 8))
            (nn.functional.linear(y, model.q.weight) if how == "from outside" else y).sum().backward()
            optimizer.step()
    assert len(seen) == 1


REASONS = ["all reached", "inactive", "frozen", "merged", "no gradient at all", "in a closure", "held by another"]


@pytest.mark.parametrize("why", REASONS)
def test_layers_with_a_reason_to_get_no_gradient_are_not_named_at_the_first_step(why: str) -> None:
    model = slora.inject(nn.Sequential(Attention()), slora.SelectiveLoRAConfig(r=2))
    cross = model[0].cross
    with torch.no_grad():
        if why == "inactive":
            cross.gate.zero_()
    if why == "frozen":
        cross.requires_grad_(False)
    if why == "merged":
        slora.merge(model)
    groups = [p for p in model.parameters() if p.requires_grad and (why != "held by another" or p is not cross.lora_B)]
    optimizer = torch.optim.SGD([*groups, nn.Parameter(torch.ones(1))])
    x = torch.randn(3, 8)

    def loss() -> Tensor:
        y = model[0](x, x if why in ("all reached", "in a closure") else None).sum()
        y = y + optimizer.param_groups[0]["params"][-1].sum()
        y.backward()
        return y

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if why == "in a closure":
            optimizer.step(loss)
        elif why != "no gradient at all":
            loss()
        optimizer.step()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("what", ["all trained", "none trained", "inactive", "not to be trained"])
def test_layers_with_a_reason_to_stay_as_they_are_are_not_named(what: str, call: str, tmp_path: Path) -> None:
    # A copy has not been named at a step.
    model = copy.deepcopy(trained(cross=what == "all trained", steps=what != "none trained"))
    with torch.no_grad():
        if what == "inactive":
            model[0].cross.gate.zero_()
    if what == "not to be trained":
        model[0].cross.lora_B.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CALLS[call](model, tmp_path)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("how", ["plain", "gone"])
def test_a_layer_that_was_replaced_is_named_and_the_others_are_kept(how: str, call: str, tmp_path: Path) -> None:
    model, x = trained(), torch.randn(3, 8)
    if how == "plain":
        model[0].cross = nn.Linear(8, 8)
    else:
        del model[0].cross
    before = model(x)
    now = "a Linear" if how == "plain" else "gone"
    with pytest.warns(slora.ReplacedLayerWarning, match=rf"^'0.cross' was adapted .*'0.cross' is {now} now"):
        CALLS[call](model, tmp_path)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    if call == "save":
        fresh = nn.Sequential(Attention())
        fresh.load_state_dict(model.state_dict(), strict=False)
        slora.load_adapter(fresh, tmp_path)
        assert {name for name, _ in adapted_layers(fresh)} == {"0.q", "0.k", "0.proj"}
        torch.testing.assert_close(fresh(x), before)


@pytest.mark.parametrize("call", ["merge", "merge_and_unload"])
def test_merging_after_projections_were_fused_is_refused(call: str, tmp_path: Path) -> None:
    model = trained()
    model[0].fuse()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(StateError, match=r"'qk' beside '0.q' was fused from its weight, without the blocks"):
        CALLS[call](model, tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    slora.save_adapter(model, tmp_path)
    model[0].qk = None
    CALLS[call](model, tmp_path)


def test_a_model_that_has_lost_every_adapted_layer_has_nothing_to_save(tmp_path: Path) -> None:
    model = trained()
    model[0].q, model[0].k, model[0].proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    del model[0].cross
    with pytest.raises(StateError, match=r"nothing to save: .* all 4 have been replaced .*'0.q' is a Linear now"):
        slora.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_resized_head_of_a_language_model_is_named(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    model = transformers.LlamaForCausalLM(config)
    slora.inject(model, slora.SelectiveLoRAConfig(r=2, target_modules=["q_proj", "lm_head"]))
    model.resize_token_embeddings(48)
    with pytest.warns(slora.ReplacedLayerWarning, match=r"'lm_head' is a Linear now"):
        slora.save_adapter(model, tmp_path)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "normed": lambda layer: parametrizations.weight_norm(layer, "weight"),
    "pruned B": lambda layer: prune.random_unstructured(layer, "lora_B", 0.5),
}


@pytest.mark.parametrize("call", ["merge", "merge_and_unload"])
@pytest.mark.parametrize("change", CHANGES)
def test_merging_into_weights_that_are_computed_is_refused(change: str, call: str, tmp_path: Path) -> None:
    model = trained()
    CHANGES[change](model[0].k)
    x = torch.randn(3, 8)
    expected = model(x)
    with pytest.raises(StateError, match=r"'0.k'.* torch.nn.utils.\w+.remove\w*\(module, '(weight|lora_B)'\)"):
        CALLS[call](model, tmp_path)
    assert torch.equal(model(x), expected)
    if change == "normed":
        with pytest.raises(StateError, match=r"'0.k' cannot be made plain: its weight is computed from others"):
            slora.unload(model)
        torch.nn.utils.parametrize.remove_parametrizations(model[0].k, "weight")
        with pytest.raises(StateError, match=r"weight of '0.k' is no parameter; set module.weight = torch.nn.Param"):
            slora.merge(model)
        model[0].k.weight = nn.Parameter(model[0].k.weight, requires_grad=False)
    else:
        prune.remove(model[0].k, "lora_B" if change == "pruned B" else "weight")
    CALLS[call](model, tmp_path)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_saving_pruned_matrices_is_refused_and_pruned_base_weights_are_not(tmp_path: Path) -> None:
    model = trained()
    prune.l1_unstructured(model[0].q, "weight", 0.5)
    slora.save_adapter(model, tmp_path)
    prune.l1_unstructured(model[0].k, "lora_A", 0.5)
    with pytest.raises(StateError, match=r"the last step would be lost: lora_A of '0.k' is pruned at each call"):
        slora.save_adapter(model, tmp_path)


@pytest.mark.parametrize("undo", [slora.unload, slora.merge_and_unload])
def test_a_forward_that_was_put_on_a_layer_is_refused_before_any_change(undo: Callable[[nn.Module], nn.Module]) -> None:
    model, x = trained(), torch.randn(3, 8)
    forward = model[0].k.forward
    model[0].k.forward = lambda x: 2 * forward(x)
    expected = model(x)
    with pytest.raises(
        StateError, match=r"'0.k' cannot be made plain: its forward was replaced .* `del module.forward`"
    ):
        undo(model)
    assert torch.equal(model(x), expected)
    del model[0].k.forward
    assert not list(adapted_layers(undo(model)))
