"""Host time per layer: forward and backward of one layer with tensors so small that only the calls themselves count.

On one thread of the CPU, whatever the device: in eager mode a GPU waits for the host wherever this is longer than what
it has to compute. A second point has real tensors, where a layer without an active block may cost nothing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import slora
from benchmarks.contenders.layer import _AddmmLinear
from benchmarks.results import Settings, need, reason_in, spread
from benchmarks.timing import Call, interleaved

RANK = 4
# Calls per repetition: enough for the clock, and over before another process takes the core.
CALLS = 10


class _Addmm(nn.Linear):
    """The least that an update in place can cost: an autograd function without any check."""

    def __init__(self, K: int, N: int) -> None:
        super().__init__(K, N)
        self.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(RANK, self.in_features))
        self.B = nn.Parameter(torch.zeros(self.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _AddmmLinear.apply(x, self.weight, self.bias, self.A, self.B, 1.0)  # type: ignore[no-untyped-call]
        return y


def _frozen(K: int, N: int) -> nn.Module:
    return nn.Linear(K, N).requires_grad_(False)


def _peft(K: int, N: int) -> nn.Module:
    peft = need("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), peft.LoraConfig(r=RANK, target_modules=["0"]))
    layer: nn.Module = model.base_model.model[0]
    return layer


def _slora(blocks: int, active: bool, inactive: str) -> Callable[[int, int], nn.Module]:
    def build(K: int, N: int) -> nn.Module:
        layer = slora.SelectiveLoRALinear(K, N * blocks, r=RANK, blocks=blocks, inactive=inactive)
        if not active:
            nn.init.zeros_(layer.gate)
        return layer

    return build


def _held(K: int, N: int) -> nn.Module:
    """As `slora.selection.Budget` leaves it: no optimizer moves the gates."""
    layer = _slora(1, True, "probe")(K, N)
    slora.freeze_gates(layer)
    return layer


class _Launchless(nn.Module):
    """The layer by the Triton backend, with launches that do nothing: the host's part on a GPU, but for the launches.

    `split`, `precomputed` and the like differ in how many of those there are; the first candidate is taken.
    """

    def __init__(self, K: int, N: int) -> None:
        super().__init__()
        need("triton")
        self.layer = _slora(1, True, "frozen")(K, N)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


@contextlib.contextmanager
def _launching_nothing() -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    from slora.ops import dispatch

    def no_launch(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: None

    # No mock, whose calls take longer than all of it.
    def on_the_cpu(*_: Any) -> Any:
        return dispatch.TRITON

    with (
        mock.patch.dict("os.environ", {"SLORA_BACKEND": "triton"}),
        mock.patch.object(dispatch, "_decided", on_the_cpu),
        mock.patch.object(JITFunction, "__getitem__", no_launch),
    ):
        yield


CONTENDERS: dict[str, Callable[[int, int], nn.Module]] = {
    "frozen nn.Linear": _frozen,
    "addmm function": _Addmm,
    "PEFT": _peft,
    "slora": _slora(1, True, "frozen"),
    "slora, gates held": _held,
    "slora, three blocks": _slora(3, True, "frozen"),
    "slora, none active": _slora(1, False, "frozen"),
    "slora, none active, probe": _slora(1, False, "probe"),
    "slora, Triton without launches": _Launchless,
}
REAL = ("frozen nn.Linear", "slora, none active")


def grid(settings: Settings) -> list[tuple[int, int, int, tuple[str, ...]]]:
    """`(M, K, N, contenders)`."""
    tiny = (4, 16, 16, tuple(CONTENDERS))
    return [tiny] if settings.grid == "tiny" else [tiny, (788, 384, 1536, REAL)]


def run(settings: Settings, ceilings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of both points."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for M, K, N, names in grid(settings):
            yield from measure(M, K, N, [name for name in names if settings.wanted(name)], settings)
    finally:
        torch.set_num_threads(before)


def measure(M: int, K: int, N: int, names: list[str], settings: Settings) -> list[dict[str, Any]]:
    """Time one forward and backward of each layer."""
    point = {"M": M, "K": K, "N": N, "r": RANK, "dtype": "fp32"}
    rows: dict[str, dict[str, Any]] = {name: {"point": point, "contender": name} for name in names}
    number = CALLS if M * K < 1000 else 1
    with reason_in(*rows.values()):
        calls: dict[str, list[Call]] = {}
        for name in names:
            with reason_in(rows[name]):
                calls[name] = [partial(_steps, CONTENDERS[name](K, N), torch.randn(M, K).requires_grad_(), number)]
        taken = interleaved(calls, "cpu", settings.repetitions(201), False, settings.at_most(20.0), {})
        for name, (seconds, _) in taken.items():
            rows[name]["seconds"] = spread([value / number for value in seconds])
    print(f"  host {' '.join(f'{k}={v}' for k, v in point.items())}", file=sys.stderr, flush=True)
    return list(rows.values())


def _steps(layer: nn.Module, x: Tensor, number: int) -> None:
    with _launching_nothing() if isinstance(layer, _Launchless) else contextlib.nullcontext():
        _run_steps(layer, x, number)


def _run_steps(layer: nn.Module, x: Tensor, number: int) -> None:
    parameters = list(layer.parameters())
    dy = torch.ones_like(layer(x).detach())
    for _ in range(number):
        layer(x).backward(dy)
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
