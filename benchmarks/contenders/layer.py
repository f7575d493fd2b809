"""One linear layer `[M, K] -> [M, N]`, computed in every way that there is.

Each builder takes a `Problem` and returns a `Layer`: what computes `y` from `x`, and the parameters whose gradients are
wanted beside that of `x`. All share one `W`, `b`, `A`, `B`.

    frozen F.linear       the limit: no update, only y and dx
    full                  the dense weight gradient
    slora, <backend>      the layer that users get, by each backend of this machine
    slora, <form>         the same by the kernels, y and dx in one form (`forms.Pin`)
    PEFT                  its own layer, one eager kernel after the other
    PEFT, compiled        the same under torch.compile
    addmm function        an autograd function that adds the update in place, in the form that Unsloth uses

slora's backend `reference` is not among them: it judges the others, and nobody who asks for speed would choose it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slora
from benchmarks.contenders import forms
from benchmarks.results import Missing, need
from benchmarks.roofline import DTYPES
from benchmarks.timing import captured
from slora import reference
from slora.ops import dispatch

THRESHOLD = 0.5
SCALING = 0.5


@dataclass(frozen=True)
class Shape:
    """One point: `x [M, K]`, `W [N, K]`, rank, `active` of `blocks` blocks, dtype by name."""

    K: int
    N: int
    M: int
    r: int
    active: int
    blocks: int
    dtype: str

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

    def __init__(self, shape: Shape, device: str, sets: int, seed: int = 0) -> None:
        self.shape, self.device = shape, device
        self._exact: dict[bool, dict[str, tuple[Tensor, Tensor, float]]] = {}
        self.dtype = DTYPES[shape.dtype]
        generator = torch.Generator(device).manual_seed(seed)

        def random(*size: int, std: float = 1.0) -> Tensor:
            return (torch.randn(*size, device=device, generator=generator) * std).to(self.dtype)

        K, N, n = shape.K, shape.N, shape.N // shape.blocks
        self.W, self.b = random(N, K, std=K**-0.5), random(N)
        self.A, self.B = random(shape.blocks, shape.r, K, std=K**-0.5), random(shape.blocks, n, shape.r)
        self.gate = torch.zeros(shape.blocks, device=device)
        self.gate[shape.chosen] = 1.0
        self.xs = [random(shape.M, K).requires_grad_() for _ in range(sets)]
        self.dys = [random(shape.M, N) for _ in range(sets)]

    def exact(self, updates: bool) -> dict[str, tuple[Tensor, Tensor, float]]:
        """What a result is measured against, on the first inputs, by `slora.reference`.

        By name: the tensor in a wider dtype, the same in the layer's own dtype, and the magnitude that roundings are
        relative to. Without `updates` no block is active. Computed once for all contenders.
        """
        if updates in self._exact:
            return self._exact[updates]
        wide = torch.float64 if self.dtype == torch.float32 else torch.float32
        names = ("y", "dx", "lora_A", "lora_B", "gate", "weight", "bias")
        results = []
        for dtype in (wide, self.dtype):
            x, dy, W, b, A, B = (
                t.detach().to(dtype) for t in (self.xs[0], self.dys[0], self.W, self.b, self.A, self.B)
            )
            gate = self.gate.to(dtype) * updates
            y = reference.selective_lora_linear(x, W, b, A, B, gate, THRESHOLD, SCALING)
            dx, dA, dB, dgate = reference.selective_lora_linear_backward(dy, x, W, A, B, gate, THRESHOLD, SCALING)
            # Those of inactive blocks belong to the policy for them, not to the layer.
            dgate = dgate * (gate >= THRESHOLD)
            results.append((y, dx, dA, dB, dgate, dy.T @ x, dy.sum(0)))
        exact, own = (dict(zip(names, tensors, strict=True)) for tensors in results)
        magnitudes = {name: float(tensor.norm()) for name, tensor in exact.items()}
        # dgate = <dB, B>: one sum in which everything may cancel.
        magnitudes["gate"] = float(exact["lora_B"].norm() * self.B.to(wide).norm())
        self._exact[updates] = {name: (exact[name], own[name], magnitudes[name]) for name in names}
        return self._exact[updates]


@dataclass
class Layer:
    """A way to compute the layer."""

    forward: Callable[[Tensor], Tensor]
    parameters: dict[str, Tensor]
    form: str | None
    """What it moves through memory, as `counting.bytes_moved` takes it; of slora's kernels known after a call, of what
    a compiler makes never."""
    updates: bool = True
    """Whether the low-rank update is part of it."""
    around: Callable[[], Any] = nullcontext
    """A context that every call runs in."""
    shaped: Callable[[str, Tensor], Tensor] = field(default=lambda name, gradient: gradient)
    """Gradients in the shape of the reference's."""

    def wanted(self, shape: Shape) -> set[str]:
        """What `trained` has to give: y, dx and the gradients of all parameters; those of an update where it is on."""
        trained = set() if self.updates and not shape.active else set(self.parameters)
        return {"y", "dx", *trained}

    def calls(self, problem: Problem, backward: bool) -> list[Callable[[], Any]]:
        """One call per set of inputs: the forward as in inference, or forward and backward."""
        if not backward:
            return [partial(self.inferred, x) for x in problem.xs]
        return [partial(self.trained, x, dy) for x, dy in zip(problem.xs, problem.dys, strict=True)]

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
        found = {"y": y.detach()}
        for name, gradient in zip(wanted, gradients, strict=True):
            if gradient is not None:
                found[name] = self.shaped(name, gradient)
        return found

    def ways(self, problem: Problem, capture: bool = True) -> dict[str, Callable[[], dict[str, Tensor]]]:
        """How the output and the gradients are computed on the first inputs, by what is to be said of a mistake.

        As launched one by one; by slora once more with the device's own gates, as a CUDA graph has them; and on a GPU
        by replays of such a graph, where it can be captured and `capture` asks for it.
        """
        x, dy = problem.xs[0], problem.dys[0]
        ways: dict[str, Callable[[], dict[str, Tensor]]] = {"": partial(self.trained, x, dy)}
        if not isinstance(self.forward, slora.SelectiveLoRALinear):
            return ways

        def prepared() -> dict[str, Tensor]:
            with slora.gates_on_device():
                return self.trained(x, dy)

        ways["with gates on the device "] = prepared
        if capture and problem.device != "cpu":
            found: dict[str, Tensor] = {}
            try:
                graph = captured([lambda: found.update(self.trained(x, dy))])
            except Exception:
                # It is timed as it is launched, then.
                torch.cuda.synchronize()
                return ways

            def replayed() -> dict[str, Tensor]:
                graph.replay()
                return {name: tensor.clone() for name, tensor in found.items()}

            ways["replayed from a CUDA graph "] = replayed
        return ways

    def counted(self, x: Tensor, dy: Tensor) -> None:
        """Forward and backward as PyTorch's FLOP counter can watch them: it cannot inside `torch.autograd.grad`."""
        with self.around():
            self.forward(x).backward(dy)
        for tensor in (x, *self.parameters.values()):
            tensor.grad = None


@contextmanager
def _backend(name: str, pinned: Callable[[], Any] = nullcontext) -> Iterator[None]:
    before = os.environ.get("SLORA_BACKEND")
    os.environ["SLORA_BACKEND"] = name
    try:
        with pinned():
            yield
    finally:
        if before is None:
            del os.environ["SLORA_BACKEND"]
        else:
            os.environ["SLORA_BACKEND"] = before


def frozen(problem: Problem) -> Layer:
    """`F.linear` with frozen parameters."""
    return Layer(lambda x: F.linear(x, problem.W, problem.b), {}, "frozen", updates=False)


def full(problem: Problem) -> Layer:
    """`F.linear` with trainable parameters."""
    W, b = (t.clone().requires_grad_() for t in (problem.W, problem.b))
    return Layer(lambda x: F.linear(x, W, b), {"weight": W, "bias": b}, "full", updates=False)


def with_slora(backend: str, form: str | None = None) -> Callable[[Problem], Layer]:
    """`SelectiveLoRALinear` under `SLORA_BACKEND=backend`, by one form; its LoRA parameters are fp32."""

    def build(problem: Problem) -> Layer:
        shape = problem.shape
        if backend == "auto" and problem.device == "cpu":
            raise Missing("on a CPU auto is torch")
        if backend == "triton" and problem.device == "cpu":
            if os.environ.get("TRITON_INTERPRET", "0") != "1":
                raise Missing("the kernels need a GPU")
            if problem.dtype == torch.bfloat16:
                raise Missing("Triton's interpreter multiplies bf16 wrongly")
        if form is not None and problem.device != "cpu" and shape.dtype == "fp32":
            raise Missing("fp32 has no forms on a GPU")
        if form is not None and not shape.active:
            raise Missing("no block is active")
        config = slora.SelectiveLoRAConfig(
            r=shape.r,
            lora_alpha=SCALING * shape.r,
            blocks=shape.blocks,
            threshold=THRESHOLD,
            gate_init=1.0,
            inactive="frozen",
        )
        layer = slora.SelectiveLoRALinear.from_linear(_linear(problem), config)
        with torch.no_grad():
            layer.lora_A.copy_(problem.A)
            layer.lora_B.copy_(problem.B)
            layer.gate.copy_(problem.gate)
        parameters: dict[str, Tensor] = {"lora_A": layer.lora_A, "lora_B": layer.lora_B, "gate": layer.gate}
        pin = nullcontext if form is None else forms.Pin(form)
        # Weight gradients are then what a measurement chooses, as without a pin.
        setting = backend if form is None or problem.device == "cpu" else "auto"
        return Layer(layer, parameters, form or "addmm", around=lambda: _backend(setting, pin))

    return build


def with_peft(compiled: bool) -> Callable[[Problem], Layer]:
    """PEFT's linear layer, its LoRA parameters in the dtype of the weight, which is its faster choice."""

    def build(problem: Problem) -> Layer:
        if problem.shape.blocks != 1 or not problem.shape.active:
            raise Missing("PEFT has no blocks that could be inactive")
        peft, shape = need("peft"), problem.shape
        config = peft.LoraConfig(r=shape.r, lora_alpha=SCALING * shape.r, target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(_linear(problem)), config, autocast_adapter_dtype=False)
        layer = model.base_model.model[0]
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            A.copy_(problem.A[0])
            B.copy_(problem.B[0])
        forward = torch.compile(layer, dynamic=False) if compiled else layer
        form = None if compiled else "eager"
        return Layer(forward, {"lora_A": A, "lora_B": B}, form, shaped=_one_block)

    return build


def addmm_function(problem: Problem) -> Layer:
    """`_AddmmLinear` on the one block."""
    if problem.shape.blocks != 1 or not problem.shape.active:
        raise Missing("the function has no blocks that could be inactive")
    A, B = (t[0].clone().requires_grad_() for t in (problem.A, problem.B))
    return Layer(
        lambda x: _AddmmLinear.apply(x, problem.W, problem.b, A, B, SCALING),  # type: ignore[no-untyped-call]
        {"lora_A": A, "lora_B": B},
        "addmm",
        shaped=_one_block,
    )


class _AddmmLinear(torch.autograd.Function):
    """The update added in place to `y` and `dx`; only `x` is kept, and S computed again in the backward."""

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


def _one_block(name: str, gradient: Tensor) -> Tensor:
    return gradient[None] if name.startswith("lora") else gradient


PINNED = {f"slora, {form}": form for form in forms.NAMES}
CONTENDERS: dict[str, Callable[[Problem], Layer]] = {
    "frozen F.linear": frozen,
    "full": full,
    **{f"slora, {name}": with_slora(name) for name in dispatch.SETTINGS if name != "reference"},
    **{name: with_slora("triton", form) for name, form in PINNED.items()},
    "PEFT": with_peft(compiled=False),
    "PEFT, compiled": with_peft(compiled=True),
    "addmm function": addmm_function,
}
FROZEN = "frozen F.linear"


def mistake(
    found: dict[str, Tensor], exact: dict[str, tuple[Tensor, Tensor, float]], wanted: Collection[str]
) -> str | None:
    """What is wrong with a contender's result, None where nothing is; `exact` as `Problem.exact` gives it.

    Everything `wanted` has to be there.

    A result may be twice as far from the exact one as the same mathematics in PyTorch calls of its dtype, plus one
    unit of that dtype for what happens to be exact there; both in the Frobenius norm.
    """
    missing = sorted(set(wanted) - found.keys())
    if missing:
        return f"{' and '.join(missing)} {'was' if len(missing) == 1 else 'were'} not computed"
    for name, (error, allowed) in errors(found, exact).items():
        if not error <= allowed:
            return f"{name} is off by {error:.3g} where {allowed:.3g} is allowed and its norm is {exact[name][2]:.3g}"
    return None


def errors(found: dict[str, Tensor], exact: dict[str, tuple[Tensor, Tensor, float]]) -> dict[str, tuple[float, float]]:
    """The error of each result and what is allowed, as `mistake` has it."""
    both = {}
    for name, value in found.items():
        wide, own, magnitude = exact[name]
        allowed = 2 * float((own.to(wide.dtype) - wide).norm()) + torch.finfo(own.dtype).eps * magnitude
        both[name] = float((value.to(wide.dtype) - wide).norm()), allowed
    return both
