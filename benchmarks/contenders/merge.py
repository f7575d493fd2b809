"""Ways to fold LoRA into all linear layers of a model: slora, PEFT, and what copying as many bytes once costs.

Putting the adapters on is not timed. No contender is timed before each of its merged weights was compared with the sum
formed in fp64 (`Case.mistake`). Peak memory is what one call adds in a process of its own. On a GPU, `device_seconds`
is the time between two events on the stream, with the host far enough ahead; `seconds` is the wall clock up to the end
of the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.profiler import DeviceType

import slora
from benchmarks.contenders import memory
from benchmarks.results import need
from benchmarks.roofline import DTYPES
from benchmarks.timing import between_events
from slora.gates import gates as gate_parameters
from slora.layers import adapted_layers
from slora.models.inject import unload
from slora.ops.flops import linear_flops

LINEARS = ["qkv", "proj", "fc1", "fc2"]
NAMES = (
    "copy", "slora batched_merge_", "slora merge_and_unload", "slora merge, copy kept", "PEFT merge_and_unload"
)  # fmt: skip


class Case:
    """One model, plain between two measurements, and an update for each of its linear layers."""

    def __init__(self, model: str, dtype: torch.dtype, rank: int, device: str) -> None:
        torch.manual_seed(0)
        self.rank, self.device = rank, torch.device(device)
        self.model = timm.create_model(model, num_classes=0).to(device, dtype).requires_grad_(False)
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, nn.Linear)}
        self.names = list(layers)
        self.weights: list[Tensor] = [layer.weight for layer in layers.values()]
        self.As = [torch.randn(rank, W.shape[1], device=device) * W.shape[1] ** -0.5 for W in self.weights]
        self.Bs = [torch.randn(W.shape[0], rank, device=device) * 1e-3 for W in self.weights]
        self.source = torch.cat([W.flatten() for W in self.weights])
        self.target = self.source.clone()

    def copy_once(self) -> None:
        """Copy the bytes of all weights, one piece, into memory that is there already: a limit with a single launch."""
        self.target.copy_(self.source)

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
        if gate_parameters(self.model):
            unload(slora.unmerge(self.model))

    def slora_merge(self) -> None:
        """`slora.merge`, which keeps the weights that it changes."""
        slora.merge(self.model)

    def slora_unload(self) -> None:
        """`slora.merge_and_unload`."""
        slora.merge_and_unload(self.model)

    @contextmanager
    def peft_adapted(self) -> Iterator[None]:
        """With PEFT's LoRA on the same layers, as it comes: its matrices are fp32, which are slora's numbers, too.

        In 16 bits PEFT would round the update before it adds it: another result.
        """
        peft = need("peft")
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
        return 0 if name == "copy" else sum(linear_flops(W.shape[0], W.shape[1], self.rank) for W in self.weights)

    def bytes(self, name: str) -> int:
        """Bytes that have to move: the weights read and written, a kept copy written, A and B read."""
        weights: int = sum(W.nbytes for W in self.weights)
        if name == "copy":
            return 2 * weights
        factors: int = sum(M.nbytes for M in (*self.As, *self.Bs))
        return (3 if "copy kept" in name else 2) * weights + factors

    @property
    def contenders(self) -> dict[str, tuple[Callable[[], Any], Callable[[], None]]]:
        """What puts adapters on, and the call that is measured."""
        ways: list[tuple[Callable[[], Any], Callable[[], None]]] = [
            (self.plain, self.copy_once),
            (self.plain, self.batched_merge),
            (self.slora_adapted, self.slora_unload),
            (self.slora_adapted, self.slora_merge),
            (self.peft_adapted, self.peft_unload),
        ]
        return dict(zip(NAMES, ways, strict=True))

    def updates(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """A `[blocks, r, K]` and B `[blocks, N / blocks, r]` of every weight, while the adapters are on."""
        if name == "slora batched_merge_":
            return [(A[None], B[None]) for A, B in zip(self.As, self.Bs, strict=True)]
        layers: list[Any] = [self.model.get_submodule(layer) for layer in self.names]
        if name.startswith("slora"):
            return [(layer.lora_A.detach(), layer.lora_B.detach()) for layer in layers]
        return [(layer.lora_A["default"].weight[None], layer.lora_B["default"].weight[None]) for layer in layers]

    def mistake(self, name: str) -> str | None:
        """What is wrong in any weight that one call leaves, None where nothing is; bits that it has to give back, too.

        The sums are formed in fp64.
        """
        prepare, call = self.contenders[name]
        before = [W.clone() for W in self.weights]
        with torch.no_grad(), prepare():
            if name == "copy":
                self.target.zero_()
                call()
                return None if torch.equal(self.target, self.source) else "the copy is not what was copied"
            updates = self.updates(name)
            call()
            # PEFT: of the update, of the sum, and a factor where it casts.
            roundings = 3 if name.startswith("PEFT") else 1
            for layer, W, (A, B) in zip(self.names, before, updates, strict=True):
                merged = self.model.get_parameter(f"{layer}.weight")
                wrong = badly_rounded(merged, W, A.double(), B.double(), roundings)
                if wrong:
                    return f"the weight of {layer} is wrong in {wrong} of {W.numel()} numbers"
        if "copy kept" in name and not same_bits(before, [self.model.get_parameter(f"{n}.weight") for n in self.names]):
            return "unmerging does not give the weights back bit for bit"
        return None

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
        device = {"device_seconds": between_events(call, ahead=10e-3)}
    else:
        device = {}
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, **device}


def badly_rounded(merged: Tensor, W: Tensor, A: Tensor, B: Tensor, roundings: int) -> int:
    """How many numbers of `merged` are too far from `W + B A`, where A and B are fp64 and have blocks.

    Allowed is half a unit of its dtype per rounding, and an fp32 unit of the sum of magnitudes per term.
    """
    exact = (B @ A).reshape(W.shape).add_(W)
    magnitude = (B.abs() @ A.abs()).reshape(W.shape).add_(W.abs())
    unit = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(2.0**-100)))) * torch.finfo(W.dtype).eps
    allowed = roundings * unit * 0.5 * (1 + 2.0**-7) + (A.shape[1] + 2) * magnitude * 2.0**-24
    return int((~((merged.double() - exact).abs() <= allowed)).sum())


def same_bits(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether the bits of all tensors are the same."""
    pairs = zip(before, after, strict=True)
    return all(a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def launches(case: Case, name: str) -> int | None:
    """How many kernels one call of `name` starts on a plain model, whoever's they are; copies and fills are none.

    None where the profiler sees nothing, as without the right to read what the GPU does.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        case.contenders[name][1]()
        torch.cuda.synchronize()
    on_gpu = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    if not on_gpu:
        return None
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_gpu)


def added_memory(name: str, model: str, dtype: str, rank: int) -> float:
    """MiB that one call of a contender adds on the CPU at its peak, to be measured in a process of its own."""
    prepare, call = Case(model, DTYPES[dtype], rank, "cpu").contenders[name]
    with torch.no_grad(), prepare():
        before = memory.peak_begins()
        call()
        return memory.peak() - before
