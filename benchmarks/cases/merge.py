"""Folding LoRA into all linear layers of a ViT-L/16: slora, PEFT, and what copying as many bytes once costs.

Putting the adapters on is not timed. Each merged weight is compared with the sum formed in fp64 before any call is
timed. `device_seconds` is the time between two events on a GPU's stream, with the host far enough ahead;
`added_memory_mib` what one call adds at its peak. All calls work on one set of weights, which is larger than the last
cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import DeviceType

import slora
from benchmarks import memory
from benchmarks.cases.rounds import in_turns, measuring
from benchmarks.correctness import expected, mismatch
from benchmarks.models import PEFT_EXCLUDES, PEFT_TARGETS, UPDATE, peft_model, randomise_updates
from benchmarks.results import BenchmarkError, Row, Settings, Wrong, need, reason_in, spread
from benchmarks.roofline import DTYPES
from benchmarks.timing import between_events
from slora.layers import adapted_layers
from slora.models.inject import unload


class Weights:
    """A model of timm, plain between two calls, and an update of rank `rank` for each of its linear layers."""

    def __init__(self, model: str, dtype: str, rank: int, device: str) -> None:
        self.name, self.dtype, self.rank, self.device = model, DTYPES[dtype], rank, device
        self.build()

    def build(self) -> None:
        """Make the model, anew after a call that has failed and may have left it half adapted."""
        torch.manual_seed(0)
        self.net = need("timm").create_model(self.name, num_classes=0).to(self.device, self.dtype).requires_grad_(False)
        self.names = [name for name, module in self.net.named_modules() if isinstance(module, nn.Linear)]
        self.As = [torch.randn(self.rank, W.shape[1], device=self.device) for W in self.now()]
        std = UPDATE * self.rank**-0.5
        self.Bs = [torch.randn(W.shape[0], self.rank, device=self.device) * std for W in self.now()]
        self.source = torch.cat([W.flatten() for W in self.now()])
        self.target = torch.zeros_like(self.source)

    def now(self) -> list[Tensor]:
        """The weights."""
        return [self.net.get_parameter(f"{name}.weight") for name in self.names]

    def batched_merge(self) -> None:
        """The operator alone."""
        slora.merging.batched_merge_(self.now(), self.As, self.Bs, [1.0] * len(self.names))

    def with_slora(self) -> Any:
        """The model with slora's blocks on every linear layer, all of them active, three of them on each qkv."""
        net = slora.inject(self.net, slora.SelectiveLoRAConfig(r=self.rank, lora_alpha=self.rank))
        randomise_updates(net)
        return net

    def with_peft(self) -> Any:
        """The model with PEFT's LoRA on the same layers, in fp32 as slora's: in 16 bits PEFT would round the update."""
        net = peft_model(self.net, self.rank, self.rank, [*PEFT_TARGETS], PEFT_EXCLUDES, fp32=True)
        randomise_updates(net)
        return net

    @contextmanager
    def call(self, name: str) -> Iterator[Callable[[], Any]]:
        """The call that is measured, with its adapters on; afterwards the model is plain."""
        try:
            yield IMPLEMENTATIONS[name](self)
            if any(True for _ in adapted_layers(self.net)):
                unload(slora.unmerge(self.net))
        except Exception:
            self.build()
            raise


# What puts adapters on and returns the call.
IMPLEMENTATIONS: dict[str, Callable[[Weights], Callable[[], Any]]] = {
    "copy": lambda weights: partial(weights.target.copy_, weights.source),
    "slora batched_merge_": lambda weights: weights.batched_merge,
    "slora merge_and_unload": lambda weights: partial(slora.merge_and_unload, weights.with_slora()),
    "slora merge, copy kept": lambda weights: partial(slora.merge, weights.with_slora()),
    "PEFT merge_and_unload": lambda weights: weights.with_peft().merge_and_unload,
}


def grid(settings: Settings, case: str = "merge") -> list[tuple[str, str, int]]:
    """`(model, dtype, rank)` in the order in which they matter."""
    if settings.grid == "tiny":
        return [("vit_tiny_patch16_224", "fp32", 4)]
    points = [("bf16", 16), *[("bf16", 128)] * settings.on_gpu, ("fp32", 16)]
    return [("vit_large_patch16_224", *point) for point in points[: 1 if settings.grid == "quick" else None]]


def measure(point: tuple[str, str, int], settings: Settings, roofline: dict[str, Any], case: str) -> list[Row]:
    """The rows of a point.

    Raises:
        BenchmarkError: the extension is not there; nothing was timed.
    """
    extension = slora.merging.extension_info()
    if not extension["available"] or (settings.on_gpu and extension["cuda"] is None):
        raise BenchmarkError(f"slora._C cannot be used: {extension['reason'] or 'it has no CUDA'}; nothing was timed")
    about = dict(zip(("model", "dtype", "r"), point, strict=True))
    with measuring(about, IMPLEMENTATIONS, settings) as rows, torch.no_grad():
        fill(rows, point, settings)
    return list(rows.values())


def fill(rows: dict[str, Row], point: tuple[str, str, int], settings: Settings) -> None:
    """Check the implementations, measure the memory that they add, and time those that are right."""
    weights = Weights(*point, settings.device)
    running: dict[str, Callable[[], Callable[[], float]]] = {}
    for name, row in rows.items():
        with reason_in(row):
            check(weights, name)
            row.update(added(weights, name))
            running[name] = lambda name=name: partial(wall_clock, weights, name)  # type: ignore[misc]
    # A round puts PEFT on a whole model, which takes far longer than the merge.
    most = 30 if settings.on_gpu else 45
    for name, (seconds, _) in in_turns(rows, running, settings, 15, most).items():
        rows[name]["seconds"] = spread(seconds)
    if settings.on_gpu:
        # What can be called again and again.
        events: dict[str, Callable[[], Callable[[], float]]] = {
            name: partial(partial, between_events, IMPLEMENTATIONS[name](weights), 10e-3)
            for name in running.keys() & {"copy", "slora batched_merge_"}
        }
        for name, (seconds, _) in in_turns(rows, events, settings, 15, most).items():
            rows[name]["device_seconds"] = spread(seconds)


def check(weights: Weights, name: str) -> None:
    """Compare every weight that one call leaves, and the bits that unmerging has to give back.

    Raises:
        Wrong: one is wrong.
    """
    before = [W.clone() for W in weights.now()]
    with weights.call(name) as call:
        updates = list(zip(weights.Bs, weights.As, strict=True))
        if name not in ("copy", "slora batched_merge_"):
            updates = [factors_of(weights.net.get_submodule(layer)) for layer in weights.names]
        call()
        if name == "copy":
            if not torch.equal(weights.target, weights.source):
                raise Wrong("the copy is not what was copied")
            return
        for layer, W, merged, (B, A) in zip(weights.names, before, weights.now(), updates, strict=True):
            # One after the other: a whole model in fp64 takes too much memory.
            exact = {layer: W.double() + (B.double() @ A.double()).view_as(W)}
            own = {layer: (W.float() + (B @ A).view_as(W)).to(W.dtype)}
            wrong = mismatch({layer: merged}, expected(exact, own, weights.dtype))
            if wrong:
                raise Wrong(f"the weight of {wrong}")
    if "copy kept" in name and not all(map(torch.equal, before, weights.now())):
        raise Wrong("unmerging does not give the weights back bit for bit")


def factors_of(layer: Any) -> tuple[Tensor, Tensor]:
    """B and A of an adapted layer of slora or PEFT, both of which scale them by 1 here."""
    if isinstance(layer, slora.SelectiveLoRALinear):
        return layer.lora_B.detach().clone(), layer.lora_A.detach().clone()
    return layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()


def wall_clock(weights: Weights, name: str) -> float:
    """Seconds of one call, up to the end of the work."""
    wait: Callable[[], object] = torch.cuda.synchronize if weights.device == "cuda" else int
    with weights.call(name) as call:
        wait()
        start = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - start


def added(weights: Weights, name: str) -> Row:
    """MiB that one call adds at its peak; and of the operator on a GPU, the number of its launches."""
    with weights.call(name) as call:
        before = memory.begin(weights.device)
        call()
        row: Row = {"added_memory_mib": memory.peak(weights.device) - before}
    if name == "slora batched_merge_" and weights.device == "cuda":
        profile: Any = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        with profile:
            call()
            torch.cuda.synchronize()
        started = [e.name for e in profile.events() if e.device_type == DeviceType.CUDA]
        # The profiler sees nothing without the right to read what the GPU does.
        if started:
            row["launches"] = sum(not event.startswith(("Memcpy", "Memset")) for event in started)
    return row
