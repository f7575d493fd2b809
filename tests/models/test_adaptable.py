"""Layers that cannot be adapted: left out by name with a warning, or refused where they are asked for."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn

import slora
from slora.errors import TargetError
from tests.models.adapting import assert_unchanged, names_of, small, state_of


class Doubling(nn.Linear):
    """A subclass whose forward computes something else, as quantised layers do."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Packed(nn.Parameter):
    """A parameter of a class of its own, as quantised weights are, with the dtype that it computes in."""


def odd_layers() -> dict[str, tuple[nn.Module, str]]:
    """Linear layers that cannot be adapted, and what is said of each."""

    def with_weight(weight: Tensor, kind: type = nn.Parameter) -> nn.Linear:
        linear = nn.Linear(8, 8)
        linear.weight = kind(weight, requires_grad=False)
        return linear

    utils, normed = nn.utils, nn.utils.parametrizations
    pruned, pruned_bias = nn.Linear(8, 8), nn.Linear(8, 8)
    utils.prune.l1_unstructured(pruned, "weight", 0.5)
    utils.prune.random_unstructured(pruned_bias, "bias", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old_norm = utils.weight_norm(nn.Linear(8, 8))
        warnings.simplefilter("ignore", DeprecationWarning)
        packed = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear})
    replaced = nn.Linear(8, 8)
    forward = replaced.forward
    replaced.forward = lambda x: 2 * forward(x)
    parametrized = r"remove_parametrizations\(module, 'weight'\)"
    return {
        "own forward": (Doubling(8, 8), r"Doubling has a forward of its own; adapt the model before"),
        "packed by torch": (packed[0], r"torch\.ao\.nn\.quantized\.dynamic\.\S*Linear keeps its weight quantised"),
        "replaced forward": (replaced, "its forward was replaced on the instance"),
        "parametrised": (normed.orthogonal(nn.Linear(8, 8)), parametrized),
        "weight norm": (normed.weight_norm(nn.Linear(8, 8)), parametrized),
        "parametrised bias": (
            normed.weight_norm(nn.Linear(8, 8), "bias", dim=0), "its bias is computed from others"
        ),
        "weight norm by hooks": (old_norm, r"remove_weight_norm\(module, 'weight'\)"),
        "spectral norm by hooks": (utils.spectral_norm(nn.Linear(8, 8)), r"remove_spectral_norm\(module, 'weight'\)"),
        "pruned": (pruned, r"its weight is pruned at each call; torch.nn.utils.prune.remove\(module, 'weight'\)"),
        "pruned bias": (pruned_bias, r"its bias is pruned at each call; torch.nn.utils.prune.remove\(module, 'bias'\)"),
        "integer weight": (with_weight(torch.ones(8, 8, dtype=torch.int8)), "its weight has dtype torch.int8; adapt"),
        "float8 weight": (with_weight(torch.ones(8, 8).to(torch.float8_e4m3fn)), "dtype torch.float8_e4m3fn; adapt"),
        "packed weight": (with_weight(torch.ones(32, 1)), r"its weight has shape \[32, 1\], packed or sharded"),
        "quantised weight": (with_weight(torch.ones(8, 8), Packed), "its weight is a Packed; inject before it is"),
        "sparse weight": (with_weight(torch.ones(8, 8).to_sparse()), "its weight has layout torch.sparse_coo"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", odd_layers())
def test_layers_that_compute_their_weight_or_output_otherwise_are_left_alone_by_name(kind: str) -> None:
    odd, reason = odd_layers()[kind]
    model = nn.Sequential()
    model.add_module("odd", odd)
    with pytest.raises(
        TargetError, match=rf"Sequential has no linear layer that can be adapted; 'odd' cannot: .*{reason}"
    ):
        slora.inject(model, small())
    model.add_module("usual", nn.Linear(8, 8))
    with pytest.raises(TargetError, match=rf"modules that cannot be adapted, such as 'odd' \(\w+\): .*{reason}"):
        slora.inject(model, small(target_modules=["odd"]))
    with pytest.warns(slora.SkippedLayerWarning, match=rf"leaves out linear layers .*: 'odd': .*{reason}"):
        slora.inject(model, small())
    assert names_of(model) == ["usual"]
    slora.unload(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slora.inject(model, small(exclude_modules=["odd"]))


class Language(nn.Module):
    """An embedding whose matrix is also that of the head."""

    def __init__(self, tied: str) -> None:
        super().__init__()
        self.embed, self.body, self.lm_head = nn.Embedding(6, 8), nn.Linear(8, 8), nn.Linear(8, 6, bias=False)
        if tied == "parameter":
            self.lm_head.weight = self.embed.weight
        else:
            self.lm_head.weight = nn.Parameter(self.embed.weight.data)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("tied", ["parameter", "memory"])
def test_a_tied_head_is_refused_at_inject_and_left_out_by_all_linear(tied: str, device: str) -> None:
    if (tied, device) == ("memory", "meta"):
        pytest.skip("on meta nothing lies anywhere")
    with torch.device(device):
        model = Language(tied)
    before = [id(p) for p in model.parameters()]
    with pytest.raises(TargetError, match=r"the weight of 'lm_head' is also 'embed.weight'.*a weight of its own"):
        slora.inject(model, small(target_modules=["body", "lm_head"]))
    assert [id(p) for p in model.parameters()] == before
    assert names_of(slora.inject(model, small())) == ["body"]
    slora.unload(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert names_of(slora.inject(model, small(target_modules=["body", "lm_head"]))) == ["body", "lm_head"]


def test_a_tied_head_of_a_language_model_is_refused_at_inject() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(TargetError, match=r"the weight of 'lm_head' is also 'model.embed_tokens.weight'"):
        slora.inject(model, small(target_modules=["q_proj", "lm_head"]))


def test_two_layers_that_share_a_weight_are_left_out_by_all_linear_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.warns(
        slora.SkippedLayerWarning, match=r"'0': its weight is also '1.weight'; '1': its weight is also '0"
    ):
        slora.inject(model, small())
    assert names_of(model) == ["2"]


def test_lazy_layers_have_to_be_run_once_before() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyLinear(8))
    with pytest.raises(TargetError, match=r"'0.weight' of a lazy module has no shape yet; run the model once"):
        slora.inject(model, small())
    assert all(p.requires_grad for p in model.parameters())
    model(torch.randn(2, 6))
    assert names_of(slora.inject(model, small())) == ["0", "1"]


@pytest.mark.parametrize("options", [{"kdim": 8}, {"vdim": 8}], ids=str)
def test_attention_with_separate_projections_is_left_alone_with_its_output_projection(options: dict[str, int]) -> None:
    # nn.MultiheadAttention reads out_proj.weight and never calls it: blocks there would be skipped silently.
    model = nn.Sequential()
    model.add_module("attn", nn.MultiheadAttention(12, 2, **options))
    model.add_module("fc", nn.Linear(12, 12))
    model.add_module("fc2", nn.Linear(12, 12))
    with pytest.warns(slora.SkippedLayerWarning, match=r"'attn.out_proj': attention that cannot be adapted reads its"):
        slora.inject(model, small())
    assert names_of(model) == ["fc2"]
    slora.unload(model)
    with pytest.raises(TargetError, match=r"cannot be adapted, such as 'attn.out_proj' \(.*\): attention that cannot"):
        slora.inject(model, small(target_modules=["out_proj"]))


class OwnForward(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("attention", [nn.MultiheadAttention, OwnForward])
@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["out_proj"]}, {"exclude_modules": ["attn"]}],
    ids=["out_proj alone", "attention excluded"],
)
def test_an_output_projection_that_is_never_called_is_refused(
    attention: type[nn.Module], config: dict[str, Any]
) -> None:
    model = nn.Sequential()
    model.add_module("attn", attention(12, 2))
    model.add_module("fc2", nn.Linear(12, 12))
    before = state_of(model)
    with pytest.raises(TargetError, match=r"'attn.out_proj' belongs to an nn.MultiheadAttention, which reads"):
        slora.inject(model, small(**config))
    assert_unchanged(model, before)
