"""Ways to train or run a vision transformer: what is frozen, what is adapted, and by which library.

    head only                     the lower limit: nothing but a new head is trained
    frozen, dx everywhere         the limit that no low-rank update on all layers can pass
    full                          everything is trained
    PEFT, all / few               LoRA on all linears, or on the few that stay active below
    slora, all / few / none active, by policy for inactive blocks

"frozen, dx everywhere" computes the frozen model, the gradient of the loss down to the output of the first layer that
can be adapted, which any update of this layer needs for its B, and the gradients of the head that everybody trains.
Under autocast both limits hold frozen weights in bf16, so that no step casts them; slora keeps such casts, PEFT casts
at every step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import slora
from benchmarks.correctness import expected, mismatch
from benchmarks.models import PEFT_EXCLUDES, PEFT_TARGETS, Inputs, Model, peft_model, randomise_updates
from benchmarks.results import Wrong
from slora.layers import adapted_layers

RANK = 16
# Of `slora.gate_penalty` in the loss.
PENALTY = 0.1
# `(model, its net, precision)` to the net to train.
Prepare = Callable[[Model, nn.Module, str], nn.Module]


class Way(NamedTuple):
    """A way to train or to run a model."""

    prepare: Prepare
    steps: int = 1
    """Training steps of one measurement, so that it holds a whole cycle of probes."""
    finish: Callable[[Any], nn.Module] | None = None
    """What is done to an adapted model before it is run, such as merging."""


def frozen(everywhere: bool) -> Prepare:
    """Frozen weights, only the head is trained; `everywhere`, dx down to the first layer that can be adapted."""

    def prepare(model: Model, net: nn.Module, precision: str) -> nn.Module:
        net.requires_grad_(False).get_submodule("head").requires_grad_(True)
        for module in net.modules() if precision == "amp" else ():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.bfloat16()
        nothing = torch.zeros((), device=next(net.parameters()).device, requires_grad=True)

        def ask_for_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # A compiler knows no new leaves, and fuses the sum.
            return output + nothing if torch.compiler.is_compiling() else output.requires_grad_()

        if everywhere:
            net.get_submodule("blocks.0.attn.qkv").register_forward_hook(ask_for_gradient)
        return net

    return prepare


def with_peft(few: bool) -> Prepare:
    """PEFT's LoRA on all linears of every block, or on the few; in a bf16 model its adapters are bf16 as well."""

    def prepare(model: Model, net: nn.Module, precision: str) -> nn.Module:
        names = model.few(net) if few else list(PEFT_TARGETS)
        adapted: nn.Module = peft_model(net, RANK, RANK, names, PEFT_EXCLUDES, precision != "bf16")
        net.get_submodule("head").requires_grad_(True)
        return adapted

    return prepare


def with_slora(active: str, inactive: str, blocks: Any = "auto") -> Prepare:
    """slora on all linears with "all", "few" or "none" of the blocks active."""

    def prepare(model: Model, net: nn.Module, precision: str) -> nn.Module:
        config = slora.SelectiveLoRAConfig(r=RANK, lora_alpha=RANK, inactive=inactive, blocks=blocks)  # type: ignore[arg-type]
        keep = set(model.few(net)) if active == "few" else set()
        slora.inject(net, config)
        with torch.no_grad():
            for name, layer in adapted_layers(net):
                layer.gate.fill_(1.0 if active == "all" or name in keep else 0.0)
        net.get_submodule("head").requires_grad_(True)
        return net

    return prepare


TRAINING = {
    "head only": Way(frozen(everywhere=False)),
    "frozen, dx everywhere": Way(frozen(everywhere=True)),
    "full": Way(lambda model, net, precision: net.requires_grad_(True)),
    "PEFT, all": Way(with_peft(few=False)),
    "PEFT, few": Way(with_peft(few=True)),
    "slora, all active": Way(with_slora("all", "probe")),
    "slora, all active, qkv as one block": Way(with_slora("all", "probe", 1)),
    "slora, few active, frozen": Way(with_slora("few", "frozen")),
    "slora, few active, probe": Way(with_slora("few", "probe"), steps=10),
    "slora, few active, exact": Way(with_slora("few", "exact")),
    "slora, none active, frozen": Way(with_slora("none", "frozen")),
}
INFERENCE = {
    "base": Way(lambda model, net, precision: net),
    "slora, merged": Way(with_slora("all", "frozen"), finish=lambda net: slora.merge_and_unload(net)),
    "slora, all active": Way(with_slora("all", "frozen")),
    "slora, few active": Way(with_slora("few", "frozen")),
    "slora, none active": Way(with_slora("none", "frozen")),
    "PEFT, merged": Way(with_peft(few=False), finish=lambda net: net.merge_and_unload()),
    "PEFT, unmerged": Way(with_peft(few=False)),
}


class Run:
    """A model that is trained or run one way: calling it takes one measurement on some inputs.

    `precision`: "fp32", "bf16" (the base in bf16) or "amp" (fp32 parameters under bf16 autocast). `mode`: "forward"
    (without gradients), or a training step, "eager", "compile" or "graph" (to be captured in a CUDA graph). `losses`
    has the loss of every step taken, on the device, where reading it stops nothing.
    """

    def __init__(self, way: Way, model: Model, precision: str, device: str, mode: str) -> None:
        self.model, self.precision, self.device, self.mode, self.steps = model, precision, device, mode, way.steps
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        torch.manual_seed(0)
        self.net = way.prepare(model, model.build(device).to(device, self.dtype), precision).train(mode != "forward")
        # B = 0 would hide an update that is left out, and the gradients of A and the gates.
        randomise_updates(self.net)
        gates = [layer.gate for _, layer in adapted_layers(self.net)]
        self.finish, self.losses, self.gated = way.finish, list[Tensor](), bool(gates)
        trained = [p for p in self.net.parameters() if p.requires_grad and not any(p is gate for gate in gates)]
        # Gates stay where they are, but take part in every step.
        groups: list[dict[str, Any]] = [{"params": trained}, {"params": gates, "lr": 0.0, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, fused=device == "cuda" or None, capturable=mode == "graph")
        self.loss: Callable[..., Tensor] = torch.compile(model.loss, dynamic=False) if mode == "compile" else model.loss

    def __call__(self, inputs: Inputs) -> None:
        if self.mode == "forward":
            self._output(self.net, inputs)
            return
        for _ in range(self.steps):
            self.losses.append(self._backward(self.net, inputs, self.loss))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _output(self, net: nn.Module, inputs: Inputs) -> Tensor:
        output: Tensor = net(inputs[0])
        return output

    def _backward(self, net: nn.Module, inputs: Inputs, loss_of: Callable[..., Tensor]) -> Tensor:
        wide = next(net.parameters()).dtype == torch.float64
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "amp" and not wide):
            loss = loss_of(net, inputs)
            if self.gated:
                loss = loss + PENALTY * slora.gate_penalty(net)
        loss.backward()
        return loss.detach()

    def _results(self, net: nn.Module, inputs: Inputs, loss_of: Callable[..., Tensor]) -> dict[str, Tensor]:
        """The output, or the loss and all gradients; those of gates and scalars are one vector."""
        if self.mode == "forward":
            return {"output": self._output(net, inputs)}
        found, sums = {"loss": self._backward(net, inputs, loss_of)}, [torch.zeros(0, device=self.device)]
        for name, p in net.named_parameters():
            if p.requires_grad and (p.dim() == 0 or name.endswith(".gate")):
                sums.append(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten())
            elif p.grad is not None:
                found[name] = p.grad
            p.grad = None
        return {**found, "gates and scalars": torch.cat(sums)}

    def _copied_results(self, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
        """What slora's reference, or PEFT, computes of the same in `dtype`."""
        cast = inputs[0].to(dtype), inputs[1]
        with mock.patch.dict("os.environ", {"SLORA_BACKEND": "reference"}):
            return self._results(copy.deepcopy(self.net).to(dtype), cast, self.model.loss)

    def check(self, *batches: Inputs) -> None:
        """Compare what is computed, before any step is taken, with copies in a wider dtype and in this one.

        Raises:
            Wrong: it differs.
        """
        wide = torch.float64 if self.dtype == torch.float32 else torch.float32
        measured = torch.bfloat16 if self.precision == "amp" else self.dtype
        against = [
            expected(self._copied_results(inputs, wide), self._copied_results(inputs, self.dtype), measured)
            for inputs in batches
        ]
        for results in against if self.gated and self.mode != "forward" else ():
            # A gate's gradient is <dB, B>, in which everything may cancel.
            products = [float(results[name].exact.norm() * p.detach().norm()) for name, p in self.net.named_parameters()
                        if name.endswith("lora_B") and name in results]  # fmt: skip
            gates = results["gates and scalars"]
            results["gates and scalars"] = gates._replace(magnitude=math.hypot(gates.magnitude, *products))
        if self.finish is not None:
            self.net = self.finish(self.net).eval()
        for inputs, results in zip(batches, against, strict=True):
            for context in (nullcontext, slora.gates_on_device):
                # In a CUDA graph only the device knows the active blocks.
                if context is nullcontext or self.mode in ("graph", "forward"):
                    with context():
                        wrong = mismatch(self._results(self.net, inputs, self.loss), results)
                    if wrong:
                        raise Wrong(wrong)

    def settle(self) -> None:
        """Read the gates now: a forward inside a CUDA graph could not, and they stay where they are."""
        slora.active_blocks(self.net)
