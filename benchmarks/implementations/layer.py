"""One linear layer `[M, K] -> [M, N]`, computed in every way that there is.

Each builder takes a `Problem` and returns a `Layer`: what computes `y` from `x`, and the parameters whose gradients are
wanted beside that of `x`. All share one `W`, `b`, `A`, `B`.

    frozen F.linear       the limit: no update, only y and dx
    full                  the dense weight gradient
    slora, <backend>      the layer that users get, by each backend of this machine
    PEFT                  its own layer, one eager kernel after the other
    PEFT, compiled        the same under torch.compile
    addmm function        an autograd function that adds the update in place, as Unsloth does
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slora
from benchmarks.correctness import Expected, expected
from benchmarks.models import peft_model
from benchmarks.results import Missing
from benchmarks.roofline import DTYPES
from slora import reference
from slora.ops import dispatch

THRESHOLD = 0.5
SCALING = 0.5
FROZEN = "frozen F.linear"


@dataclass(frozen=True)
class Shape:
    """One point: `x [M, K]`, `W [N, K]`, rank, `active` of `blocks` blocks, dtype by name."""

    K: int
    N: int
    M: int
    r: int
    active: int = 1
    blocks: int = 1
    dtype: str = "fp32"

    @property
    def share(self) -> float:
        """The active share of the blocks."""
        return self.active / self.blocks

    @property
    def chosen(self) -> list[int]:
        """The active blocks, spread evenly."""
        return [i * self.blocks // self.active for i in range(self.active)]

    @property
    def point(self) -> dict[str, Any]:
        """As the result file spells it."""
        active = str(self.active) if self.blocks == 1 else f"{self.active}/{self.blocks}"
        return {"K": self.K, "N": self.N, "M": self.M, "r": self.r, "active": active, "dtype": self.dtype}


class Problem:
    """The tensors of a shape: random, `sets` pairs of `x` and `dy`."""

    def __init__(self, shape: Shape, device: str, sets: int) -> None:
        self.shape, self.device, self.dtype = shape, device, DTYPES[shape.dtype]
        self._exact: dict[bool, dict[str, Expected]] = {}
        generator = torch.Generator(device).manual_seed(0)

        def random(*size: int, std: float = 1.0) -> Tensor:
            return (torch.randn(*size, device=device, generator=generator) * std).to(self.dtype)

        K, N, n = shape.K, shape.N, shape.N // shape.blocks
        self.W, self.b = random(N, K, std=K**-0.5), random(N)
        self.A, self.B = random(shape.blocks, shape.r, K, std=K**-0.5), random(shape.blocks, n, shape.r)
        self.gate = torch.zeros(shape.blocks, device=device)
        self.gate[shape.chosen] = 1.0
        self.xs = [random(shape.M, K).requires_grad_() for _ in range(sets)]
        self.dys = [random(shape.M, N) for _ in range(sets)]

    def exact(self, updates: bool) -> dict[str, Expected]:
        """What results on the first inputs are compared with, by `slora.reference`; computed once.

        Without `updates` no block is active.
        """
        if updates in self._exact:
            return self._exact[updates]
        wide = torch.float64 if self.dtype == torch.float32 else torch.float32
        results: list[dict[str, Tensor]] = []
        for dtype in (wide, self.dtype):
            x, dy, W, b, A, B = (
                t.detach().to(dtype) for t in (self.xs[0], self.dys[0], self.W, self.b, self.A, self.B)
            )
            gate = self.gate.to(dtype) * updates
            y = reference.selective_lora_linear(x, W, b, A, B, gate, THRESHOLD, SCALING)
            dx, dA, dB, dgate = reference.selective_lora_linear_backward(dy, x, W, A, B, gate, THRESHOLD, SCALING)
            # Those of inactive blocks belong to the policy for them, not to the layer.
            dgate = dgate * (gate >= THRESHOLD)
            results.append({"y": y, "dx": dx, "lora_A": dA, "lora_B": dB, "gate": dgate, "weight": dy.T @ x,
                            "bias": dy.sum(0)})  # fmt: skip
        found = expected(results[0], results[1], self.dtype)
        # dgate = <dB, B>: one sum in which everything may cancel.
        found["gate"] = found["gate"]._replace(magnitude=float(found["lora_B"].exact.norm() * self.B.to(wide).norm()))
        self._exact[updates] = found
        return found


@dataclass
class Layer:
    """A way to compute the layer.

    `updates`: whether the low-rank update is part of it. `around`: a context that every call runs in.
    """

    forward: Callable[[Tensor], Tensor]
    parameters: dict[str, Tensor]
    updates: bool = True
    around: Callable[[], Any] = nullcontext

    def wanted(self, shape: Shape) -> set[str]:
        """What `trained` has to give: y, dx and the gradients of all parameters; those of an update where it is on."""
        return {"y", "dx", *(() if self.updates and not shape.active else self.parameters)}

    def inferred(self, x: Tensor) -> Tensor:
        """The forward without a graph."""
        with self.around(), torch.no_grad():
            return self.forward(x)

    def trained(self, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        """The output and all gradients, by name."""
        with self.around():
            y = self.forward(x)
            # Not .backward(): adding to .grad would be timed as well.
            wanted = {"dx": x, **self.parameters}
            gradients = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
        found = zip(wanted, gradients, strict=True)
        return {"y": y.detach(), **{name: gradient for name, gradient in found if gradient is not None}}

    def counted(self, x: Tensor, dy: Tensor) -> None:
        """Forward and backward as PyTorch's FLOP counter can watch them: it cannot inside `torch.autograd.grad`."""
        with self.around():
            self.forward(x).backward(dy)
        for tensor in (x, *self.parameters.values()):
            tensor.grad = None


def frozen(problem: Problem) -> Layer:
    """`F.linear` with frozen parameters."""
    return Layer(lambda x: F.linear(x, problem.W, problem.b), {}, updates=False)


def full(problem: Problem) -> Layer:
    """`F.linear` with trainable parameters."""
    W, b = (t.clone().requires_grad_() for t in (problem.W, problem.b))
    return Layer(lambda x: F.linear(x, W, b), {"weight": W, "bias": b}, updates=False)


def with_slora(backend: str) -> Callable[[Problem], Layer]:
    """`SelectiveLoRALinear` under `SLORA_BACKEND=backend`; its LoRA parameters are fp32."""

    def build(problem: Problem) -> Layer:
        shape = problem.shape
        if problem.device == "cpu" and backend == "auto":
            raise Missing("on a CPU auto is torch")
        if problem.device == "cpu" and backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
            raise Missing("the kernels need a GPU")
        if problem.device == "cpu" and backend == "triton" and shape.dtype == "bf16":
            raise Missing("Triton's interpreter multiplies bf16 wrongly")
        config = slora.SelectiveLoRAConfig(
            r=shape.r, lora_alpha=SCALING * shape.r, blocks=shape.blocks, threshold=THRESHOLD, gate_init=1.0,
            inactive="frozen",
        )  # fmt: skip
        layer = slora.SelectiveLoRALinear.from_linear(_linear(problem), config)
        with torch.no_grad():
            layer.lora_A.copy_(problem.A)
            layer.lora_B.copy_(problem.B)
            layer.gate.copy_(problem.gate)
        parameters: dict[str, Tensor] = {"lora_A": layer.lora_A, "lora_B": layer.lora_B, "gate": layer.gate}
        return Layer(layer, parameters, around=partial(_backend, backend))

    return build


@contextmanager
def _backend(name: str) -> Iterator[None]:
    before = os.environ.get("SLORA_BACKEND")
    os.environ["SLORA_BACKEND"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["SLORA_BACKEND"]
        else:
            os.environ["SLORA_BACKEND"] = before


def with_peft(compiled: bool) -> Callable[[Problem], Layer]:
    """PEFT's linear layer, its LoRA parameters in the dtype of the weight, which is its faster choice."""

    def build(problem: Problem) -> Layer:
        if problem.shape.blocks != 1 or not problem.shape.active:
            raise Missing("PEFT has no blocks that could be inactive")
        net, r = nn.Sequential(_linear(problem)), problem.shape.r
        layer = peft_model(net, r, SCALING * r, ["0"]).base_model.model[0]
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            A.copy_(problem.A[0])
            B.copy_(problem.B[0])
        forward = torch.compile(layer, dynamic=False) if compiled else layer
        return Layer(forward, {"lora_A": A, "lora_B": B})

    return build


def addmm_function(problem: Problem) -> Layer:
    """`AddmmLinear` on the one block."""
    if problem.shape.blocks != 1 or not problem.shape.active:
        raise Missing("the function has no blocks that could be inactive")
    A, B = (t[0].clone().requires_grad_() for t in (problem.A, problem.B))

    def forward(x: Tensor) -> Tensor:
        y: Tensor = AddmmLinear.apply(x, problem.W, problem.b, A, B, SCALING)  # type: ignore[no-untyped-call]
        return y

    return Layer(forward, {"lora_A": A, "lora_B": B})


class AddmmLinear(torch.autograd.Function):
    """The update added in place to `y` and `dx`; only `x` is saved, and S computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        y = F.linear(x, W, b).addmm_(x @ A.T, B.T, alpha=scaling)
        ctx.save_for_backward(x, W, A, B)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, W, A, B = ctx.saved_tensors
        T = dy @ B
        dA = (T.T @ x).mul_(ctx.scaling)
        dB = (dy.T @ (x @ A.T)).mul_(ctx.scaling)
        dx = (dy @ W).addmm_(T, A, alpha=ctx.scaling)
        return dx, None, None, dA, dB, None


def _linear(problem: Problem) -> nn.Linear:
    linear = nn.Linear(problem.shape.K, problem.shape.N, device="meta")
    linear.weight = nn.Parameter(problem.W, requires_grad=False)
    linear.bias = nn.Parameter(problem.b, requires_grad=False)
    return linear


IMPLEMENTATIONS: dict[str, Callable[[Problem], Layer]] = {
    FROZEN: frozen,
    "full": full,
    # Not "reference": it judges the others, and nobody who asks for speed would choose it.
    **{f"slora, {name}": with_slora(name) for name in dispatch.SETTINGS if name != "reference"},
    "PEFT": with_peft(compiled=False),
    "PEFT, compiled": with_peft(compiled=True),
    "addmm function": addmm_function,
}
