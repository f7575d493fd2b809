"""What a model computes with `W + sum_i I_i c B_i A_i` in place of every `W`: the truth that contenders are held to.

The plain base model is called with merged weights (`torch.func.functional_call`), and autograd goes through the sums
to A, B and, by `I_i + gate_i - gate_i.detach()`, to the gates. Nothing of slora or PEFT computes here; only A, B, the
gates and the parameters trained in full are read from a contender.

Done twice: in a wider dtype (fp64 for fp32, fp32 for bf16 and amp), which is the truth, and in the precision that is
measured, which is what plain PyTorch makes of the same. A result may be twice as far from the truth as that, plus one
unit of its dtype for what happens to be exact there; in the Frobenius norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.contenders.step import PENALTY, Step, dtype_of
from benchmarks.models import Inputs, Model
from slora.layers import adapted_layers

# What PEFT puts around and behind the names of the base model.
PREFIX, INFIX = "base_model.model.", ".base_layer"


@dataclass(frozen=True)
class Update:
    """What is added to one base weight: names in the trained model, and what the library makes of them.

    Attributes:
        weight: the name in the base model.
        gate: None where there is none.
        looks: the factor of the gradient that the gates of inactive blocks get.
    """

    weight: str
    A: str
    B: str
    scaling: float
    gate: str | None = None
    threshold: float = 0.0
    looks: float = 0.0


def updates_of(net: nn.Module) -> list[Update]:
    """All updates of a model that slora or PEFT has adapted."""
    found = []
    for name, layer in adapted_layers(net):
        # A probe is due every so many steps, the first among them, and reads all rows of a small batch.
        looks = {"exact": 1.0, "probe": float(layer.probe_every), "frozen": 0.0}[layer.inactive]
        weight, A, B, gate = (f"{name}.{part}" for part in (layer.weight_name, "lora_A", "lora_B", "gate"))
        found.append(Update(weight, A, B, layer.scaling, gate, layer.threshold, looks))
    for name, module in net.named_modules():
        if hasattr(module, "base_layer"):
            A, B = (f"{name}.lora_{part}.default.weight" for part in "AB")
            found.append(Update(f"{name.removeprefix(PREFIX)}.weight", A, B, module.scaling["default"]))
    return found


class Truth:
    """A model of `Model` as `Step` builds it, plain, to be computed with weights that a contender would merge.

    The contender is read when this is made: it may merge or move on later.
    """

    def __init__(self, model: Model, net: nn.Module, precision: str, device: str) -> None:
        self.model, self.precision, self.device = model, precision, device
        self.updates = updates_of(net)
        adapters = {name for update in self.updates for name in (update.A, update.B, update.gate)}
        parameters = dict(net.named_parameters())
        self.trained = {n: p.detach().clone() for n, p in parameters.items() if p.requires_grad or n in adapters}
        torch.manual_seed(0)
        self.plain = model.build(device).to(device, dtype_of(precision)).train(net.training)

    @property
    def unit(self) -> float:
        """Of the precision that is measured."""
        return torch.finfo(torch.float32 if self.precision == "fp32" else torch.bfloat16).eps

    @property
    def wide(self) -> torch.dtype:
        """The dtype of the truth."""
        return torch.float64 if self.precision == "fp32" else torch.float32

    def gradients(self, inputs: Inputs, wide: bool) -> dict[str, Tensor]:
        """The loss with its penalty, and the gradients by the contender's names."""
        leaves = self._leaves()
        loss = self._call(self.model.loss, inputs, leaves, wide)
        gates = [leaves[u.gate] for u in self.updates if u.gate is not None]
        if gates:
            loss = loss + PENALTY * torch.cat(gates).abs().mean()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return {"loss": loss.detach()} | {n: g for n, g in zip(leaves, found, strict=True) if g is not None}

    @torch.no_grad()
    def output(self, inputs: Inputs, wide: bool, updated: bool = True) -> Tensor:
        """The output, of the base model where it is not `updated`."""
        return self._call(self.model.forward, inputs, self._leaves() if updated else {}, wide)

    def _leaves(self) -> dict[str, Tensor]:
        return {name: t.to(self.wide).requires_grad_() for name, t in self.trained.items()}

    def _call(self, what: Callable[..., Tensor], inputs: Inputs, leaves: Mapping[str, Tensor], wide: bool) -> Tensor:
        run = self.wide if wide else dtype_of(self.precision)
        held = dict(self.plain.named_parameters()) | dict(self.plain.named_buffers())
        base = {name: t.detach().to(self.wide) if t.is_floating_point() else t for name, t in held.items()}
        adapters = {name for u in self.updates for name in (u.A, u.B, u.gate)}
        for name, leaf in leaves.items():
            if name not in adapters:
                base[name.removeprefix(PREFIX).replace(INFIX, "")] = leaf
        for update in self.updates if leaves else ():
            base[update.weight] = base[update.weight] + _sum_of(update, leaves)
        state = {f"net.{name}": t.to(run) if t.is_floating_point() else t for name, t in base.items()}
        given = tuple(t.to(run) if t.is_floating_point() else t for t in inputs)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "amp" and not wide):
            result: Tensor = torch.func.functional_call(_Calls(self.plain, what), state, (given,))
        return result


class _Calls(nn.Module):
    """`what(net, inputs)` as a module, so that `functional_call` can give it weights."""

    def __init__(self, net: nn.Module, what: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net, self.what = net, what

    def forward(self, inputs: Inputs) -> Tensor:
        return self.what(self.net, inputs)


def _sum_of(update: Update, leaves: Mapping[str, Tensor]) -> Tensor:
    """`sum_i I_i c B_i A_i`, the blocks of outputs one below the other."""
    A, B = leaves[update.A], leaves[update.B]
    blocks = (B @ A).unflatten(0, (1, -1)) if A.dim() == 2 else B @ A
    if update.gate is not None:
        gate = leaves[update.gate]
        on = (gate >= update.threshold).to(gate.dtype)
        passed = (gate - gate.detach()) * torch.where(on > 0, on, update.looks)
        blocks = (on + passed)[:, None, None] * blocks
    return update.scaling * blocks.flatten(0, 1)


def step_mistake(step: Step, inputs: Inputs) -> str | None:
    """What is wrong with the loss and the gradients of a step that is yet to be taken, None where nothing is.

    A step that is to be captured in a CUDA graph is captured for this, too, where it can be.
    """
    truth = Truth(step.model, step.net, step.precision, step.device)
    found = _sums_together(truth, step.replayed(inputs) if step.fixed else step.gradients(inputs))
    exact, own = (_sums_together(truth, truth.gradients(inputs, wide)) for wide in (True, False))
    return mistake(found, exact, own, truth.unit)


@torch.no_grad()
def output_mistake(truth: Truth, net: nn.Module, inputs: Inputs) -> str | None:
    """What is wrong with the output of `net`, None where nothing is; what is allowed has to be far below the update."""
    exact, own = (truth.output(inputs, wide) for wide in (True, False))
    moved = float((exact - truth.output(inputs, wide=True, updated=False)).norm())
    allowed = 2 * float((own.to(exact.dtype) - exact).norm()) + truth.unit * float(exact.norm())
    error = float((truth.model.forward(net, inputs).to(exact.dtype) - exact).norm())
    change = f"the updates change it by {moved:.3g}"
    if moved and not allowed < moved / 2:
        return f"its output may be off by {allowed:.3g} and {change}: whether they are there cannot be told"
    return None if error <= allowed else f"its output is off by {error:.3g} where {allowed:.3g} is allowed and {change}"


def mistake(
    found: Mapping[str, Tensor], exact: Mapping[str, Tensor], own: Mapping[str, Tensor], unit: float
) -> str | None:
    """What is further from the exact results than allowed; a gradient that was not computed counts as 0."""
    for name, true in exact.items():
        wide = true.dtype
        magnitude = float(true.norm())
        allowed = 2 * float((own[name].to(wide) - true).norm()) + unit * magnitude
        if name not in found and magnitude > 0:
            return f"{name} was not computed"
        error = float((found[name].to(wide) - true).norm()) if name in found else 0.0
        if not error <= allowed:
            return f"{name} is off by {error:.3g} where {allowed:.3g} is allowed and its norm is {magnitude:.3g}"
    return None


def _sums_together(truth: Truth, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results, with the gradients of all gates and scalars as one vector.

    Each is a single sum in which everything may cancel, so that its error says nothing of that of another order.
    """
    names = [name for name, t in truth.trained.items() if t.dim() == 0 or name in {u.gate for u in truth.updates}]
    rest = {name: t for name, t in results.items() if name not in names}
    if names:
        sums = [results.get(name, torch.zeros_like(truth.trained[name])).flatten() for name in names]
        rest["gates and scalars"] = torch.cat([t.to(truth.wide) for t in sums])
    return rest
