"""Ways to train a whole model: what is frozen, what is adapted, and by which library.

    head only                     the lower limit: nothing but a new head is trained
    frozen, dx everywhere         the limit that no low-rank update on all layers can pass
    full                          everything is trained
    PEFT, all / few               LoRA on all linears, or on the few that stay active below
    slora, all / few / none active, by policy for inactive blocks

"Few" is the attention and MLP output projections of the last two layers.

Why "frozen, dx everywhere" is a limit: it computes the frozen model, the gradient of the loss down to the outputs of
the first layers that can be adapted, and the gradients of the head that everybody trains; nothing of what an update
adds. Any update of those layers needs that gradient for its B. Not computed is what no update needs: dx of those first
layers, and of what is below them. Where attention holds the weights of query, key and value itself (CLIP), the first
gradient is that of its output, which is less than an update needs. Under autocast both limits hold the frozen weights
of these layers in bf16, so that no step casts them, which is the best that any library can do; slora keeps such casts,
PEFT casts at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import slora
from benchmarks.models import Model
from benchmarks.results import Missing, need
from slora.models.targets import targets

RANK = 16


Prepare = Callable[[Model, nn.Module, str], nn.Module]


@dataclass(frozen=True)
class Contender:
    """A way to train.

    Attributes:
        prepare: gets the base model and the precision of `step.Step`; returns the model to train.
        steps: training steps of one measurement, so that it holds a whole cycle of probes.
    """

    name: str
    prepare: Prepare
    steps: int = 1


def frozen(everywhere: bool) -> Prepare:
    """Frozen weights, only the head is trained; `everywhere`, dx down to the first layers that can be adapted."""

    def prepare(model: Model, net: nn.Module, precision: str) -> nn.Module:
        adaptable = targets(net, slora.SelectiveLoRAConfig())
        model.with_trainable_head(net.requires_grad_(False))
        if precision == "amp":
            for name in adaptable:
                for parameter in net.get_submodule(name).parameters(recurse=False):
                    parameter.data = parameter.data.bfloat16()
        if everywhere:
            for name in model.first(net):
                net.get_submodule(name).register_forward_hook(_asking(next(net.parameters()).device))
        return net

    return prepare


class _AsksForGradient(torch.autograd.Function):
    """The identity of something frozen, whose gradient is asked for and then dropped. It starts no kernel."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, asks: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


def _asking(device: torch.device) -> Callable[..., Tensor]:
    """A forward hook by which the output of a module asks for its gradient."""
    asks = torch.zeros((), device=device, requires_grad=True)

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            # A compiler leaves out what nobody gets: here the gradient's sum is wanted, which it fuses.
            return output + asks
        asked: Tensor = _AsksForGradient.apply(output, asks)  # type: ignore[no-untyped-call]
        return asked

    return hook


def full(model: Model, net: nn.Module, precision: str) -> nn.Module:
    """Full fine-tuning."""
    return net.requires_grad_(True)


def with_peft(few: bool) -> Prepare:
    """PEFT's LoRA on all linears of every block, or on the few.

    In a bf16 model its adapters are bf16 as well (`autocast_adapter_dtype=False`). Its default, fp32 adapters, would
    cast every input to fp32 and multiply there: slower, and more memory. So PEFT is measured at its best; the price is
    the precision of its updates. slora's adapters are fp32 everywhere.
    """

    def prepare(model: Model, net: nn.Module, precision: str) -> nn.Module:
        peft = need("peft")
        if model.peft_targets is None:
            raise Missing(f"PEFT does not adapt the attention of {model.name} without materialising its weights")
        layers = model.few(net) if few else list(model.peft_targets)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=layers, exclude_modules=list(model.peft_excludes) or None
        )
        adapted = peft.get_peft_model(net, config, autocast_adapter_dtype=precision != "bf16")
        model.with_trainable_head(adapted.get_base_model())
        trained: nn.Module = adapted
        return trained

    return prepare


def with_slora(active: str, inactive: str, blocks: Any = "auto") -> Prepare:
    """slora on all linears with "all", "few" or "none" of the blocks active."""

    def prepare(model: Model, net: nn.Module, precision: str) -> nn.Module:
        config = slora.SelectiveLoRAConfig(r=RANK, lora_alpha=RANK, inactive=inactive, blocks=blocks)  # type: ignore[arg-type]
        keep = set(model.few(net)) if active == "few" else set()
        slora.inject(net, config)
        with torch.no_grad():
            for name, layer in slora.layers.adapted_layers(net):
                layer.gate.fill_(1.0 if active == "all" or name in keep else 0.0)
        return model.with_trainable_head(net)

    return prepare


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("head only", frozen(everywhere=False)),
        Contender("frozen, dx everywhere", frozen(everywhere=True)),
        Contender("full", full),
        Contender("PEFT, all", with_peft(few=False)),
        Contender("PEFT, few", with_peft(few=True)),
        Contender("slora, all active", with_slora("all", "probe")),
        Contender("slora, all active, qkv as one block", with_slora("all", "probe", 1)),
        Contender("slora, few active, frozen", with_slora("few", "frozen")),
        Contender("slora, few active, probe", with_slora("few", "probe"), steps=10),
        Contender("slora, few active, exact", with_slora("few", "exact")),
        Contender("slora, none active, frozen", with_slora("none", "frozen")),
    )
}
