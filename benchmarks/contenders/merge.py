"""Ways to fold LoRA into all linear layers of a model: slora, PEFT, and what copying those weights once costs.

Putting the adapters on is not timed. Nothing is timed before the merged weights were compared with sums formed in
fp64 (`check`). Peak memory is what one call adds in a process of its own. On a GPU, `device_seconds` is the time
between two events on the stream, with the host far enough ahead; `seconds` is the wall clock up to the end of the work.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import timm
import torch
from torch import Tensor, nn

import slora
from benchmarks.record import BenchmarkError
from benchmarks.settings import DTYPES
from slora.flops import linear_flops
from slora.gate import adapted_layers
from slora.inject import unload

LINEARS = ["qkv", "proj", "fc1", "fc2"]


class Case:
    """One model, plain between two measurements, and an update for each of its linear layers."""

    def __init__(self, model: str, dtype: torch.dtype, rank: int, device: str) -> None:
        torch.manual_seed(0)
        self.rank, self.device = rank, torch.device(device)
        self.model = timm.create_model(model, num_classes=0).to(device, dtype).requires_grad_(False)
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, nn.Linear)}
        self.weights: list[Tensor] = [layer.weight for layer in layers.values()]
        self.As = [torch.randn(rank, W.shape[1], device=device) * W.shape[1] ** -0.5 for W in self.weights]
        self.Bs = [torch.randn(W.shape[0], rank, device=device) * 1e-3 for W in self.weights]
        self.copies = [W.clone() for W in self.weights]

    def copy_once(self) -> None:
        """Copy every weight into memory that is there already."""
        for copy, W in zip(self.copies, self.weights, strict=True):
            copy.copy_(W)

    def batched_merge(self) -> None:
        """The operator alone: one term of rank r per weight."""
        slora.merging.batched_merge_(self.weights, self.As, self.Bs, [1.0] * len(self.weights))

    @contextmanager
    def slora_adapted(self) -> Iterator[None]:
        """With slora's blocks on every linear layer, all of them active, three of them on each qkv."""
        slora.inject(self.model, slora.SelectiveLoRAConfig(r=self.rank, lora_alpha=self.rank))
        for _, layer in adapted_layers(self.model):
            nn.init.normal_(layer.lora_B, std=1e-3)
        yield
        if slora.gate.gates(self.model):
            unload(slora.unmerge(self.model))

    def slora_merge(self) -> None:
        """`slora.merge`, which keeps the weights that it changes."""
        slora.merge(self.model)

    def slora_unload(self) -> None:
        """`slora.merge_and_unload`."""
        slora.merge_and_unload(self.model)

    @contextmanager
    def peft_adapted(self) -> Iterator[None]:
        """With PEFT's LoRA on the same layers, as it comes: its matrices are fp32."""
        config = peft.LoraConfig(
            r=self.rank, lora_alpha=self.rank, target_modules=LINEARS, exclude_modules=["patch_embed.proj"]
        )
        self.wrapped = peft.get_peft_model(self.model, config)
        for name, parameter in self.wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=1e-3)
        yield

    def peft_unload(self) -> None:
        """PEFT's `merge_and_unload`."""
        self.wrapped.merge_and_unload()

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Without adapters."""
        yield

    def flops(self, name: str) -> int:
        """FLOPs of the sum of products that a call adds to the weights."""
        return 0 if name == "copy" else sum(linear_flops(*W.shape, self.rank) for W in self.weights)

    def bytes(self, name: str) -> int:
        """Bytes that have to move: the weights read and written, a kept copy written, A and B read."""
        weights = sum(W.nbytes for W in self.weights)
        if name == "copy":
            return 2 * weights
        return (3 if "copy kept" in name else 2) * weights + sum(M.nbytes for M in (*self.As, *self.Bs))

    @property
    def contenders(self) -> dict[str, tuple[Callable[[], Any], Callable[[], None]]]:
        """What puts adapters on, and the call that is measured."""
        return {
            "copy": (self.plain, self.copy_once),
            "slora batched_merge_": (self.plain, self.batched_merge),
            "slora merge_and_unload": (self.slora_adapted, self.slora_unload),
            "slora merge, copy kept": (self.slora_adapted, self.slora_merge),
            "PEFT merge_and_unload": (self.peft_adapted, self.peft_unload),
        }

    def run(self, name: str) -> dict[str, float]:
        """Seconds of one call."""
        prepare, call = self.contenders[name]
        with torch.no_grad(), prepare():
            return timed_on_gpu(call) if self.device.type == "cuda" else timed(call)


def timed(call: Callable[[], None]) -> dict[str, float]:
    """Wall clock."""
    start = time.perf_counter()
    call()
    return {"seconds": time.perf_counter() - start}


def timed_on_gpu(call: Callable[[], None]) -> dict[str, float]:
    """Wall clock up to the end of the work, and the time between events with the host ahead.

    The second needs a call of its own where that can be repeated; `merge_and_unload` is run once.
    """
    torch.cuda.synchronize()
    if call.__name__ in ("copy_once", "batched_merge"):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(20_000_000)  # about 10 ms, in which the host gets ahead
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        device = {"device_seconds": first.elapsed_time(last) / 1e3}
    else:
        device = {}
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, **device}


def check(case: Case) -> None:
    """Refuse to time a merge that is wrong: a weight of each shape against its sum in fp64."""
    chosen = {tuple(W.shape): i for i, W in enumerate(case.weights)}.values()
    before = {i: case.weights[i].double() for i in chosen}
    case.batched_merge()
    for i in chosen:
        W, A, B = case.weights[i], case.As[i].double(), case.Bs[i].double()
        require_rounded(W, before[i] + B @ A, before[i].abs() + B.abs() @ A.abs(), case.rank + 2, "batched_merge_")
    for adapt, call in (case.contenders["slora merge_and_unload"], case.contenders["PEFT merge_and_unload"]):
        W = case.weights[0]
        old = W.double()
        with torch.no_grad(), adapt():
            if call.__name__ == "slora_unload":
                layer = dict(adapted_layers(case.model))["blocks.0.attn.qkv"]
                A, B = layer.lora_A.double(), layer.lora_B.double()
                delta, size = ((b @ a).reshape(W.shape) for a, b in ((A, B), (A.abs(), B.abs())))
                roundings = 1
            else:
                layer = case.wrapped.get_submodule("base_model.model.blocks.0.attn.qkv")
                A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
                delta, size = B @ A, B.abs() @ A.abs()
                roundings = 3  # of the delta, the sum, and a factor where it casts
            call()
        require_rounded(W, old + delta, old.abs() + size, case.rank + 2, call.__name__, roundings)


def require_rounded(W: Tensor, exact: Tensor, magnitude: Tensor, terms: int, what: str, roundings: int = 1) -> None:
    """`|W - exact|` is at most half a unit of its dtype per rounding and an fp32 unit of `magnitude` per term."""
    unit = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(2.0**-100)))) * torch.finfo(W.dtype).eps
    allowed = roundings * unit * 0.5 * (1 + 2.0**-7) + terms * magnitude * 2.0**-24
    wrong = (W.double() - exact).abs() > allowed
    if bool(wrong.any()):
        raise BenchmarkError(f"{what} is wrong in {int(wrong.sum())} of {W.numel()} numbers; nothing was timed")


def launches(case: Case) -> int:
    """How many kernels one call of the operator starts, whoever's they are; copies and fills are none."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        case.batched_merge()
        torch.cuda.synchronize()
    on_gpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_gpu)


def added_memory(name: str, model: str, dtype: str, rank: int) -> float:
    """MiB that one call of a contender adds on the CPU at its peak, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_memory, args=(sender, name, model, dtype, rank, torch.get_num_threads()))
    process.start()
    process.join()
    if process.exitcode:
        raise BenchmarkError(f"{name}: the process that measures memory ended with {process.exitcode}")
    return float(receiver.recv())


def _measure_memory(sender: Any, name: str, model: str, dtype: str, rank: int, threads: int) -> None:
    torch.set_num_threads(threads)
    case = Case(model, DTYPES[dtype], rank, "cpu")
    prepare, call = case.contenders[name]
    with torch.no_grad(), prepare():
        # What earlier steps have freed but the allocator has kept would hide what the call needs.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident_mib("VmRSS")
        call()
        sender.send(resident_mib("VmHWM") - before)


def resident_mib(field: str) -> float:
    """A line of /proc/self/status."""
    return int(re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.M)[1]) / 1024  # type: ignore[index]
