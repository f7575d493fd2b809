"""Host time per layer: forward and backward of one layer with tensors so small that only the calls themselves count.

On one thread of the CPU, whatever the device: in eager mode a GPU waits for the host wherever this is longer than what
it has to compute. A second point has real tensors, where a layer without an active block may cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import slora
from benchmarks.cases.rounds import measuring, take_times
from benchmarks.implementations.layer import AddmmLinear
from benchmarks.models import peft_model
from benchmarks.results import Row, Settings, need, reason_in
from benchmarks.timing import Call

RANK = 4
# Calls per repetition: enough for the clock, and over before another process takes the core.
CALLS = 10


class _Addmm(nn.Linear):
    """The least that an update in place can cost: an autograd function without any check."""

    def __init__(self, K: int, N: int) -> None:
        super().__init__(K, N)
        self.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(RANK, K))
        self.B = nn.Parameter(torch.zeros(N, RANK))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = AddmmLinear.apply(x, self.weight, self.bias, self.A, self.B, 1.0)  # type: ignore[no-untyped-call]
        return y


def _slora(blocks: int = 1, active: bool = True, inactive: str = "frozen") -> Callable[[int, int], nn.Module]:
    def build(K: int, N: int) -> nn.Module:
        layer = slora.SelectiveLoRALinear(K, N * blocks, r=RANK, blocks=blocks, inactive=inactive)
        if not active:
            nn.init.zeros_(layer.gate)
        return layer

    return build


def _held(K: int, N: int) -> nn.Module:
    """As `slora.selection.Budget` leaves it: no optimizer moves the gates."""
    layer = _slora(inactive="probe")(K, N)
    slora.freeze_gates(layer)
    return layer


def _peft(K: int, N: int) -> nn.Module:
    layer: nn.Module = peft_model(nn.Sequential(nn.Linear(K, N)), RANK, 8, ["0"]).base_model.model[0]
    return layer


LAUNCHLESS = "slora, Triton without launches"
IMPLEMENTATIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "frozen nn.Linear": lambda K, N: nn.Linear(K, N).requires_grad_(False),
    "addmm function": _Addmm,
    "PEFT": _peft,
    "slora": _slora(),
    "slora, gates held": _held,
    "slora, three blocks": _slora(blocks=3),
    "slora, none active": _slora(active=False),
    "slora, none active, probe": _slora(active=False, inactive="probe"),
    LAUNCHLESS: _slora(),
}
REAL = ("frozen nn.Linear", "slora, none active")


def grid(settings: Settings, case: str = "host") -> list[tuple[int, int, int, tuple[str, ...]]]:
    """`(M, K, N, names)`."""
    tiny = (4, 16, 16, tuple(IMPLEMENTATIONS))
    return [tiny] if settings.grid == "tiny" else [tiny, (788, 384, 1536, REAL)]


def measure(
    point: tuple[int, int, int, tuple[str, ...]], settings: Settings, roofline: dict[str, Any], case: str
) -> list[Row]:
    """The rows of a point."""
    M, K, N, names = point
    calls: dict[str, list[Call]] = {}
    number, before = CALLS if M == 4 else 1, torch.get_num_threads()
    torch.set_num_threads(1)
    with measuring({"M": M, "K": K, "N": N, "r": RANK, "dtype": "fp32"}, names, settings) as rows:
        for name, row in rows.items():
            with reason_in(row):
                x = torch.randn(M, K).requires_grad_()
                calls[name] = [partial(_steps, name, IMPLEMENTATIONS[name](K, N), x, number)]
        take_times(rows, calls, settings, 201, 20.0, steps=dict.fromkeys(calls, number))
    torch.set_num_threads(before)
    return list(rows.values())


def _steps(name: str, layer: nn.Module, x: Tensor, number: int) -> None:
    """Forward and backward, `number` times."""
    parameters = [x, *layer.parameters()]
    with _launching_nothing() if name == LAUNCHLESS else nullcontext():
        dy = torch.ones_like(layer(x).detach())
        for _ in range(number):
            layer(x).backward(dy)
            for parameter in parameters:
                parameter.grad = None


def _launching_nothing() -> ExitStack:
    """The Triton backend with launches that do nothing: the host's part on a GPU, but for the launches."""
    need("triton")
    from slora.kernels import launch
    from slora.ops import dispatch

    def no_launch(*_: Any) -> None:
        pass

    def on_a_gpu(*_: Any) -> Any:
        return dispatch.TRITON

    # No mock of functions, whose calls would take longer than all of it.
    stack = ExitStack()
    stack.enter_context(mock.patch.dict("os.environ", {"SLORA_BACKEND": "triton"}))
    stack.enter_context(mock.patch.object(dispatch, "_decided", on_a_gpu))
    stack.enter_context(mock.patch.object(launch, "run", no_launch))
    return stack
