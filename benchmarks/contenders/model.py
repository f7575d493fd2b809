"""Ways to train a whole model: what is frozen, what is adapted, and by which library.

    head only                     the lower limit: nothing but a new head is trained
    frozen, dx everywhere         the limit that no low-rank update on all layers can pass
    full                          everything is trained
    PEFT, all / few               LoRA on all linears, or on the few that stay active below
    slora, all / few / none active, by policy for inactive blocks

"Few" is the attention and MLP output projections of the last two layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import slora
from benchmarks import counting
from benchmarks.contenders.peers import Missing, need
from benchmarks.models import Inputs, Model

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
        self, contender: Contender, model: Model, inputs: Inputs, precision: str, device: str, compiled: bool = False,
        fixed: bool = False,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        pure = precision == "bf16"
        net = model.build(device).to(device, dtype_of(precision))
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
        self.input_gradient = contender.input_gradient
        if contender.input_gradient:
            _gradients_from_embeddings(self.net)
        self.inputs = self.own(inputs)
        self.gated = bool(gates)
        self.forward: Callable[..., Tensor] = model.loss
        if compiled:
            self.forward = torch.compile(model.loss, dynamic=False)

    def own(self, inputs: Inputs) -> Inputs:
        """`inputs` as this contender takes them: the same memory, which asks for its gradient where it has to."""
        return tuple(t.detach().requires_grad_(self.input_gradient and t.is_floating_point()) for t in inputs)

    def __call__(self) -> None:
        """Take `count` training steps."""
        self.take(self.inputs)

    def take(self, inputs: Inputs) -> None:
        """Take `count` training steps on `inputs`, which are its own."""
        for _ in range(self.count):
            self._once(inputs, self.forward)

    def calls(self, sets: Sequence[Inputs]) -> list[StepOn]:
        """One call per set of inputs."""
        return [StepOn(self, self.own(inputs)) for inputs in sets]

    def _once(self, inputs: Inputs, forward: Callable[..., Tensor]) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            loss = forward(self.net, inputs)
            if self.gated:
                loss = loss + 0.1 * slora.gate_penalty(self.net)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for tensor in inputs:
            tensor.grad = None

    def counted(self) -> tuple[int, list[counting.Compulsory]]:
        """FLOPs of `count` training steps, and the compulsory bytes of each.

        The steps are eager ones, compiled or not: the counters do not see what a compiler has put together.
        """
        bytes_of: list[counting.Compulsory] = []

        def steps() -> None:
            for _ in range(self.count):
                existing = self.storages()
                bytes_of.append(
                    counting.of_step(
                        lambda: self._once(self.inputs, self.model.loss),
                        self.net,
                        self.inputs,
                        self.optimizer,
                        existing,
                    )
                )

        return counting.flops(steps), bytes_of

    def storages(self) -> dict[int, int]:
        """What it holds between two steps: parameters, buffers, inputs, optimizer state, kept casts."""
        states = self.optimizer.state.values()
        tensors = [*self.net.parameters(), *self.net.buffers(), *self.inputs]
        tensors += [value for state in states for value in state.values() if torch.is_tensor(value)]
        for _, layer in slora.gate.adapted_layers(self.net):
            tensors += [cast for _, cast in layer._cast.values()]
        return counting.storages(t for t in tensors if t.device.type == self.device)

    def settle(self) -> None:
        """Read the gates now: a forward inside a CUDA graph could not, and they stay where they are."""
        if self.gated:
            slora.active_blocks(self.net)


@dataclass(frozen=True)
class StepOn:
    """Training steps on one set of inputs: a call to be timed."""

    step: Step
    inputs: Inputs

    def __call__(self) -> None:
        """Take them."""
        self.step.take(self.inputs)

    def settle(self) -> None:
        """As `Step.settle`."""
        self.step.settle()


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of parameters and inputs at a precision of `Step`."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _gradients_from_embeddings(net: nn.Module) -> None:
    """Make what an embedding gives for token numbers ask for a gradient; images do so themselves."""
    for module in net.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda module, args, output: output.requires_grad_())
