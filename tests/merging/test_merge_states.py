"""States and arguments in which a merge is refused: merged already, plain, shared weights, odd scales."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slora
from slora.errors import ConfigError, StateError
from tests.merging.merged_models import adapted, assert_restored, snapshot

pytestmark = pytest.mark.usefixtures("poisoned")


def test_no_state_goes_into_or_out_of_a_merged_model_unnoticed(vit: nn.Module, randomise: Any) -> None:
    model = adapted(vit, randomise)
    clean = {key: value.clone() for key, value in model.state_dict().items()}
    slora.merge(model)
    with pytest.raises(StateError, match=r"is merged; call slora.unmerge\(model\) before load_state_dict"):
        model.load_state_dict(clean)
    of_merged = {key: value.clone() for key, value in model.state_dict().items()}
    slora.unmerge(model)
    with pytest.raises(StateError, match=r"saved while 'blocks.0.attn.qkv' was merged.*slora.unmerge\(model\)"):
        model.load_state_dict(of_merged)
    assert list(model.state_dict()) == list(clean)
    model.load_state_dict(clean)
    # Without slora's keys it is a plain state with merged weights.
    plain = slora.merge_and_unload(model)
    plain.load_state_dict(of_merged, strict=False)


def test_a_scale_for_a_model_that_is_merged_already_is_refused(vit: nn.Module, randomise: Any) -> None:
    model = slora.merge(adapted(vit, randomise))
    merged = snapshot(model)
    with pytest.raises(StateError, match=r"merged already, so scale=0.5 has no effect; call slora.unmerge first"):
        slora.merge_and_unload(model, 0.5)
    for name, p in model.named_parameters():
        assert torch.equal(p, merged[name][1])


def test_states_that_do_not_allow_a_call_are_refused(vit: nn.Module, randomise: Any) -> None:
    for call in (slora.merge, slora.unmerge, slora.merge_and_unload):
        with pytest.raises(StateError, match=r"no adapted layer; call slora.inject\(model, config\) first"):
            call(vit)
    with torch.device("meta"):
        empty = slora.inject(nn.Sequential(nn.Linear(8, 8)), slora.SelectiveLoRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(StateError, match="'0' is on meta, where weights have no values; materialise the model first"):
        slora.merge(empty)
    model = adapted(vit, randomise)
    with pytest.raises(StateError, match="not merged; there is nothing to undo"):
        slora.unmerge(model)
    slora.merge(model)
    merged = snapshot(model)
    with pytest.raises(StateError, match=r"is merged already; call slora.unmerge\(model\) first"):
        slora.merge(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, merged[name][1])


def test_a_model_that_is_merged_in_part_is_not_merged_again(vit: nn.Module, randomise: Any) -> None:
    model = adapted(vit, randomise)
    before = snapshot(model)
    slora.merge(model.blocks[0])
    for call in (slora.merge, slora.merge_and_unload):
        with pytest.raises(StateError, match=r"'blocks.0.attn.qkv' is merged already"):
            call(model)
    slora.unmerge(model)
    assert_restored(model, before)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_not_finite_is_refused(scale: float, vit: nn.Module, randomise: Any) -> None:
    model = adapted(vit, randomise)
    before = snapshot(model)
    for call in (slora.merge, slora.merge_and_unload):
        with pytest.raises(ConfigError, match=f"scale={scale} is not finite; 1.0 merges the full update"):
            call(model, scale)
        with pytest.raises(ConfigError, match=r"scale='1' is not a number; 1.0 merges the full update"):
            call(model, "1")
        assert_restored(model, before)


class Tied(nn.Module):
    """An embedding whose matrix may also be a linear layer's, or two linear layers that share one, or its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.two = nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def tie(self, what: str) -> Tied:
        if what == "embedding":
            self.one.weight = self.embed.weight
        elif what == "linear":
            self.two.weight = self.one.weight
        else:
            self.two.weight = nn.Parameter(self.one.weight.data)
        return self

    def forward(self, ids: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(self.embed(ids))))


@pytest.mark.parametrize("what", ["embedding", "linear", "memory"])
def test_a_weight_that_another_module_shares_is_not_merged(what: str, randomise: Any) -> None:
    # Merging would change the other module, too, and unmerging in turn would keep the wrong weight.
    model = randomise(slora.inject(Tied(), slora.SelectiveLoRAConfig(r=2))).tie(what)
    ids = torch.arange(8)
    expected, before = model(ids), snapshot(model)
    for call in (slora.merge, slora.merge_and_unload):
        with pytest.raises(StateError, match=r"the weight of '(one|two)' is shared with '\w+', which merging"):
            call(model)
        assert_restored(model, before)
        assert torch.equal(model(ids), expected)


def test_a_shared_weight_without_an_active_block_does_not_stand_in_the_way(randomise: Any) -> None:
    model = randomise(slora.inject(Tied(), slora.SelectiveLoRAConfig(r=2))).tie("embedding")
    with torch.no_grad():
        model.one.gate.fill_(0.0)
    before = snapshot(model)
    slora.unmerge(slora.merge(model))
    assert_restored(model, before)
