"""One training step of a contender: forward, loss, backward, optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import slora
from benchmarks import counting
from benchmarks.contenders.model import Contender
from benchmarks.models import Inputs, Model, randomise_updates
from benchmarks.timing import captured, first_line
from slora.gates import gates as gate_parameters

# Of `slora.gate_penalty` in the loss.
PENALTY = 0.1


class Step:
    """One contender, ready to take training steps.

    `precision`: "fp32", "bf16" (the base in bf16) or "amp" (fp32 parameters under bf16 autocast). `fixed`: the step is
    to be captured in a CUDA graph.

    Attributes:
        count: training steps of one measurement.
        losses: those of all steps taken, on the device, where reading them stops nothing.
        not_replayed: why `replayed` could not capture its graph, None where it could or was not asked.
    """

    def __init__(
        self, contender: Contender, model: Model, inputs: Inputs, precision: str, device: str, compiled: bool = False,
        fixed: bool = False,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        net = model.build(device).to(device, dtype_of(precision))
        self.net = contender.prepare(model, net, precision).train()
        # B = 0 would hide an update that is left out, and the gradients of A and the gates.
        randomise_updates(self.net)
        self.device, self.precision, self.count, self.model = device, precision, contender.steps, model
        self.fixed = fixed
        gates = {id(gate) for gate in gate_parameters(self.net)}
        trained = [p for p in self.net.parameters() if p.requires_grad]
        # Gates stay where the contender put them, but take part in every step.
        groups: list[dict[str, Any]] = [{"params": [p for p in trained if id(p) not in gates]}]
        if gates:
            held = {"params": [p for p in trained if id(p) in gates], "lr": 0.0, "weight_decay": 0.0}
            groups += [held] if held["params"] else []
        on_gpu = device == "cuda"
        self.optimizer = torch.optim.AdamW(groups, fused=True if on_gpu else None, capturable=fixed and on_gpu)
        self.inputs = inputs
        self.gated = bool(gates)
        self.losses: list[Tensor] = []
        self.not_replayed: str | None = None
        self.forward: Callable[..., Tensor] = model.loss
        if compiled:
            self.forward = torch.compile(model.loss, dynamic=False)

    def __call__(self) -> None:
        """Take `count` training steps."""
        self.take(self.inputs)

    def take(self, inputs: Inputs) -> None:
        """Take `count` training steps on `inputs`."""
        for _ in range(self.count):
            self._once(inputs, self.forward)

    def calls(self, sets: Sequence[Inputs]) -> list[StepOn]:
        """One call per set of inputs."""
        return [StepOn(self, inputs) for inputs in sets]

    def _once(self, inputs: Inputs, forward: Callable[..., Tensor]) -> None:
        self.losses.append(self.backward(inputs, forward))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, inputs: Inputs, forward: Callable[..., Tensor]) -> Tensor:
        """The first half of a step: leave every gradient in its parameter and return the loss."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "amp"):
            loss = forward(self.net, inputs)
            if self.gated:
                loss = loss + PENALTY * slora.gate_penalty(self.net)
        loss.backward()
        return loss.detach()

    def gradients(self, inputs: Inputs) -> dict[str, Tensor]:
        """The loss, and by name the gradients of all parameters that got one."""
        found = {"loss": self.backward(inputs, self.forward)}
        found.update({name: p.grad for name, p in self.net.named_parameters() if p.grad is not None})
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def replayed(self, inputs: Inputs) -> dict[str, Tensor]:
        """The same from a CUDA graph, or from eager mode where it cannot be captured and will be timed so, too."""
        call = GradientsOn(self, inputs, {})
        try:
            captured([call])
        except Exception as error:
            torch.cuda.synchronize()
            self.not_replayed = first_line(error)
            return self.gradients(inputs)
        return call.found

    def diverged(self) -> str | None:
        """What is wrong with the losses of the steps taken, None where all are finite."""
        wrong = int((~torch.stack(self.losses).isfinite()).sum())
        return f"the loss of {wrong} of {len(self.losses)} steps is not finite" if wrong else None

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
        for _, layer in slora.layers.adapted_layers(self.net):
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


@dataclass(frozen=True)
class GradientsOn:
    """The gradients of a step on one set of inputs: a call to be captured."""

    step: Step
    inputs: Inputs
    found: dict[str, Tensor]

    def __call__(self) -> None:
        """Compute them."""
        self.found.update(self.step.gradients(self.inputs))

    def settle(self) -> None:
        """As `Step.settle`."""
        self.step.settle()


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of parameters and inputs at a precision of `Step`."""
    return torch.bfloat16 if precision == "bf16" else torch.float32
