"""Attention classes other than PyTorch's, open_clip's own first: recognised by their parameters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slora
from slora.errors import TargetError
from slora.layers import ProjectionAttention
from tests.layers.attention_modules import B, E, L, adapt, open_clip_attention

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask"),
]

FORMS = {
    "plain": {},
    "qk norm": {"qk_norm": True},
    "scaled cosine": {"scaled_cosine": True},
    "scaled heads, inner norm": {"scale_heads": True, "inner_norm": True},
    "dropout": {"attn_drop": 0.3, "proj_drop": 0.2},
}


def cosine_fixed(base: nn.Module) -> nn.Module:
    """open_clip 3.3.0 calls `torch.bmm` on four dimensions in the scaled cosine form; `matmul` is what it means."""

    class Fixed(type(base)):
        def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            N, L, C = x.shape
            q, k, v = (
                t.reshape(N, L, self.num_heads, -1).transpose(1, 2)
                for t in F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            )
            scale = torch.clamp(self.logit_scale, max=self.logit_scale_max).exp()
            weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)) * scale
            weights = weights if attn_mask is None else weights + attn_mask
            return self.out_proj((weights.softmax(-1) @ v).transpose(1, 2).reshape(N, L, C))

    base.__class__ = Fixed
    return base


def form_of(form: str) -> nn.Module:
    base = open_clip_attention(**FORMS[form])
    return cosine_fixed(base) if form == "scaled cosine" else base


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_open_clips_attention_is_its_own_bit_for_bit_until_the_first_step(form: str, mask: str) -> None:
    base = form_of(form)
    ours = adapt(base)
    assert isinstance(ours, ProjectionAttention)
    assert isinstance(ours, type(base))
    x = torch.randn(B, L, E)
    attn_mask = {"none": None, "bool": torch.rand(L, L) > 0.8, "float": torch.randn(L, L)}[mask]
    if form == "scaled cosine" and mask == "bool":
        attn_mask = None
    for training in (True, False):
        torch.manual_seed(3)
        expected = base.train(training)(x, attn_mask=attn_mask)
        torch.manual_seed(3)
        assert torch.equal(ours.train(training)(x, attn_mask=attn_mask), expected)


@pytest.mark.parametrize("form", [f for f in FORMS if f != "dropout"])
def test_open_clips_attention_after_training_is_that_of_the_merged_weights(form: str) -> None:
    ours = adapt(form_of(form), trained=True)
    x = torch.randn(B, L, E, requires_grad=True)
    with torch.no_grad():
        ours.gate[1] = 0.0
    (plain,) = slora.merge_and_unload(nn.Sequential(copy.deepcopy(ours)))
    assert not isinstance(plain, ProjectionAttention)
    y, expected = ours(x), plain(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    (one,) = torch.autograd.grad(y.square().sum(), x)
    (two,) = torch.autograd.grad(expected.square().sum(), x)
    # fp32 through two projections and a softmax: 1e-4 of the largest element.
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4 * float(two.abs().max()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_open_clips_attention_computes_the_same(copied: Callable[[nn.Module], nn.Module]) -> None:
    ours = adapt(open_clip_attention(), trained=True)
    x = torch.randn(B, L, E)
    twin = copied(ours)
    assert torch.equal(twin(x), ours(x))
    with torch.no_grad():
        twin.gate.zero_()
    assert not torch.equal(twin(x), ours(x))


class NoProjection(nn.Module):
    """Has the parameters, of which it reads the bias alone."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * E, E))
        self.in_proj_bias = nn.Parameter(torch.randn(3 * E))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.in_proj_bias[:E]


def test_a_class_that_never_reads_its_projection_is_refused_rather_than_skipped() -> None:
    ours = adapt(NoProjection(), out_proj=False)
    with pytest.raises(TargetError, match=r"NoProjection does not read self.in_proj_weight"):
        ours(torch.randn(2, E))


class OwnProjection(NoProjection):
    """Multiplies by itself."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x @ part.t() for part in self.in_proj_weight.chunk(3))
        return q + k * v + self.in_proj_bias[:E]


def test_a_class_that_multiplies_by_itself_sees_the_blocks() -> None:
    ours, x = adapt(OwnProjection(), trained=True, out_proj=False), torch.randn(2, E)
    (plain,) = slora.merge_and_unload(nn.Sequential(copy.deepcopy(ours)))
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-4)
