"""Ways to train a whole model: what is frozen, what is adapted, and by which library.

    head only                     the lower limit: nothing but a new head is trained
    frozen, dx everywhere         the limit that no low-rank update on all layers can pass
    full                          everything is trained
    PEFT, all / few               LoRA on all linears, or on the few that stay active below
    slora, all / few / none active, by policy for inactive blocks

"Few" is the attention and MLP output projections of the last two layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import slora
from benchmarks.contenders.peers import Missing, need
from benchmarks.models import Model

RANK = 16


@dataclass(frozen=True)
class Contender:
    """A way to train.

    Attributes:
        prepare: gets the base model and `pure`, whether its parameters are 16 bits wide; returns the model to train.
        steps: training steps of one measurement, so that it holds a whole cycle of probes.
        input_gradient: whether the first layer's input asks for its gradient.
        sparse: whether it needs to know which layers are "few".
    """

    name: str
    prepare: Callable[[Model, nn.Module, bool], nn.Module]
    steps: int = 1
    input_gradient: bool = False


def frozen(model: Model, net: nn.Module, pure: bool) -> nn.Module:
    """Frozen weights; only the head is trained."""
    return model.with_trainable_head(net.requires_grad_(False))


def full(model: Model, net: nn.Module, pure: bool) -> nn.Module:
    """Full fine-tuning."""
    return net.requires_grad_(True)


def with_peft(few: bool) -> Callable[[Model, nn.Module, bool], nn.Module]:
    """PEFT's LoRA on all linears of every block, or on the few."""

    def prepare(model: Model, net: nn.Module, pure: bool) -> nn.Module:
        peft = need("peft")
        if model.peft_targets is None:
            raise Missing(f"PEFT does not adapt the attention of {model.name} without materialising its weights")
        targets = model.few(net) if few else list(model.peft_targets)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=targets, exclude_modules=list(model.peft_excludes) or None
        )
        # In a 16-bit model its adapters would be fp32 and every input cast; both libraries get one dtype there.
        adapted = peft.get_peft_model(net, config, autocast_adapter_dtype=not pure)
        model.with_trainable_head(adapted.get_base_model())
        trained: nn.Module = adapted
        return trained

    return prepare


def with_slora(active: str, inactive: str, blocks: Any = "auto") -> Callable[[Model, nn.Module, bool], nn.Module]:
    """slora on all linears with "all", "few" or "none" of the blocks active."""

    def prepare(model: Model, net: nn.Module, pure: bool) -> nn.Module:
        config = slora.SelectiveLoRAConfig(r=RANK, lora_alpha=RANK, inactive=inactive, blocks=blocks)  # type: ignore[arg-type]
        keep = set(model.few(net)) if active == "few" else set()
        slora.inject(net, config)
        with torch.no_grad():
            for name, layer in slora.gate.adapted_layers(net):
                layer.gate.fill_(1.0 if active == "all" or name in keep else 0.0)
        return model.with_trainable_head(net)

    return prepare


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("head only", frozen),
        Contender("frozen, dx everywhere", frozen, input_gradient=True),
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


class Step:
    """One contender, ready to take training steps: forward, loss, backward, optimizer.

    `precision`: "fp32", "bf16" (the base in bf16) or "amp" (fp32 parameters under bf16 autocast). `fixed`: the step is
    to be captured in a CUDA graph.
    """

    def __init__(
        self, contender: Contender, model: Model, batch: int, precision: str, device: str, compiled: bool = False,
        fixed: bool = False,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        pure = precision == "bf16"
        dtype = torch.bfloat16 if pure else torch.float32
        net = model.build(device).to(device, dtype)
        self.net = contender.prepare(model, net, pure).train()
        self.device, self.amp, self.count, self.model = device, precision == "amp", contender.steps, model
        gates = {id(gate) for gate in slora.gate.gates(self.net)}
        trained = [p for p in self.net.parameters() if p.requires_grad]
        # Gates stay where the contender put them, but take part in every step.
        groups = [{"params": [p for p in trained if id(p) not in gates]}]
        if gates:
            held = {"params": [p for p in trained if id(p) in gates], "lr": 0.0, "weight_decay": 0.0}
            groups += [held] if held["params"] else []
        on_gpu = device == "cuda"
        self.optimizer = torch.optim.AdamW(groups, fused=True if on_gpu else None, capturable=fixed and on_gpu)
        self.inputs = model.inputs(batch, device, dtype)
        if contender.input_gradient:
            self.embedding = _gradient_from_the_start(self.net, self.inputs)
        self.gated = bool(gates)
        self.forward: Callable[..., Tensor] = model.loss
        if compiled:
            self.forward = torch.compile(model.loss, dynamic=False)

    def __call__(self) -> None:
        """Take `count` training steps."""
        for _ in range(self.count):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
                loss = self.forward(self.net, self.inputs)
                if self.gated:
                    loss = loss + 0.1 * slora.gate_penalty(self.net)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            for tensor in self.inputs:
                tensor.grad = None

    def settle(self) -> None:
        """Read the gates now: a forward inside a CUDA graph could not, and they stay where they are."""
        if self.gated:
            slora.active_blocks(self.net)


def _gradient_from_the_start(net: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Make the first activations ask for a gradient: the images, or what an embedding gives for token numbers."""
    for tensor in inputs:
        if tensor.is_floating_point():
            tensor.requires_grad_()
    embeddings = [module for module in net.modules() if isinstance(module, nn.Embedding)]
    return [module.register_forward_hook(lambda module, args, output: output.requires_grad_()) for module in embeddings]
