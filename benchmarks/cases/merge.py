"""Folding LoRA into all linear layers of a ViT-L/16: slora, PEFT, and what copying as many bytes once costs.

Putting the adapters on is not timed. Each merged weight is compared with the sum formed in fp64 before any call is
timed. `device_seconds` is the time between two events on a GPU's stream, with the host far enough ahead;
`added_memory_mib` what one call adds at its peak, on the CPU in a process of its own. `flops` and `bytes` are by
formula, the least that the result takes. All calls work on one set of weights, which is larger than the last cache.
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
from benchmarks.counting import beside_roofline
from benchmarks.models import UPDATE, peft_model, randomise_updates
from benchmarks.results import BenchmarkError, Row, Settings, Wrong, need, reason_in, spread
from benchmarks.roofline import DTYPES
from benchmarks.timing import between_events
from slora.layers import adapted_layers
from slora.models.inject import unload
from slora.ops.flops import linear_flops


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
        targets = ["qkv", "proj", "fc1", "fc2"]
        net = peft_model(self.net, self.rank, self.rank, targets, ("patch_embed.proj",), fp32=True)
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
    points = [("bf16", 16), *[("bf16", 128)] * (settings.on_gpu or settings.grid == "full"), ("fp32", 16)]
    if settings.grid == "quick":
        points = points[:1]
    if settings.grid == "full":
        points += [(dtype, rank) for dtype in ("bf16", "fp32", "fp16") for rank in (4, 64)]
    return [("vit_large_patch16_224", *point) for point in points]


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
        fill(rows, point, settings, roofline)
    return list(rows.values())


def fill(rows: dict[str, Row], point: tuple[str, str, int], settings: Settings, roofline: dict[str, Any]) -> None:
    """Check the implementations, time those that are right, and measure the memory that they add."""
    weights = Weights(*point, settings.device)
    running: dict[str, Callable[[], Callable[[], float]]] = {}
    for name, row in rows.items():
        with reason_in(row):
            check(weights, name)
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
    products = sum(linear_flops(W.shape[0], W.shape[1], point[2]) for W in weights.now())
    moved, factors = (sum(t.nbytes for t in tensors) for tensors in (weights.now(), [*weights.As, *weights.Bs]))
    if not settings.on_gpu:
        # The processes below have models of their own.
        del weights
        running.clear()
    for name, row in rows.items():
        if "seconds" not in row:
            continue
        # The weights read and written, a saved copy written, A and B read.
        row["flops"] = 0 if name == "copy" else products
        row["bytes"] = 2 * moved + ("copy kept" in name) * moved + (name != "copy") * factors
        median = row["device_seconds" if "device_seconds" in row else "seconds"]["median"]
        # Merging computes in fp32, whatever the weights' dtype.
        row.update(beside_roofline(roofline, "fp32", median, row["flops"], row["bytes"]))
        with reason_in(row):
            if settings.on_gpu:
                row.update(on_gpu(weights, name))
            # A process takes far longer than a tiny merge.
            elif settings.grid != "tiny" or name == "copy":
                row["added_memory_mib"] = memory.in_a_process(added_memory, name, *point)


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


def on_gpu(weights: Weights, name: str) -> Row:
    """MiB of a GPU that one call adds at its peak; and of the operator, the number of its launches."""
    with weights.call(name) as call:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        row: Row = {"added_memory_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}
    if name == "slora batched_merge_":
        profile: Any = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        with profile:
            call()
            torch.cuda.synchronize()
        started = [e.name for e in profile.events() if e.device_type == DeviceType.CUDA]
        # The profiler sees nothing without the right to read what the GPU does.
        if started:
            row["launches"] = sum(not event.startswith(("Memcpy", "Memset")) for event in started)
    return row


def added_memory(name: str, model: str, dtype: str, rank: int) -> float:
    """MiB that one call adds on the CPU at its peak, to be measured in a process of its own."""
    with torch.no_grad(), Weights(model, dtype, rank, "cpu").call(name) as call:
        before = memory.peak_begins()
        call()
        return memory.peak() - before
