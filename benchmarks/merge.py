"""Merging LoRA into all linear layers of a ViT-L/16: slora, PEFT, and what copying those weights once costs.

    python -m benchmarks.merge [--device cpu|cuda] [--ranks 16] [--precisions bf16 fp32] [--rounds 15]

The contenders take turns within each round on the weights of one model, so a slow moment of the machine hits them all;
medians and percentiles are over rounds. Putting the adapters on is not timed. Nothing is timed before the merged
weights were compared with sums formed in fp64. Peak memory is what one call adds in a process of its own. On a GPU,
`device_seconds` is the time between two events on the stream, with the host far enough ahead; `seconds` is the wall
clock up to the end of the work.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import re
import sys
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
from benchmarks.record import device_name, spread, write_result
from slora.gate import adapted_layers
from slora.inject import unload

LINEARS = ["qkv", "proj", "fc1", "fc2"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


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
        raise SystemExit(f"{what} is wrong in {int(wrong.sum())} of {W.numel()} numbers; nothing was timed")


def measure(args: argparse.Namespace, precision: str, rank: int) -> dict[str, Any]:
    """Time all contenders at one precision and rank."""
    case = Case(args.model, DTYPES[precision], rank, args.device)
    check(case)
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in case.contenders}
    for round_number in range(args.rounds + 1):
        for name in taken:
            for kind, value in case.run(name).items():
                if round_number:  # the first round warms up
                    taken[name].setdefault(kind, []).append(value)
        print(f"\r{precision}, r = {rank}: round {round_number} of {args.rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)
    result: dict[str, Any] = {name: {k: spread(v) for k, v in kinds.items()} for name, kinds in taken.items()}
    if args.device == "cuda":
        result["slora batched_merge_"]["launches"] = launches(case)
    del case
    for name, entry in result.items():
        entry["added_memory_mib"] = added_memory(name, args, precision, rank)
    return result


def launches(case: Case) -> int:
    """How many merge kernels one call of the operator starts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        case.batched_merge()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if "merge_kernel" in event.key)


def added_memory(name: str, args: argparse.Namespace, precision: str, rank: int) -> float:
    """MiB that one call of a contender adds at its peak, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_memory, args=(sender, name, args, precision, rank))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name}: the process that measures memory ended with {process.exitcode}")
    return float(receiver.recv())


def _measure_memory(sender: Any, name: str, args: argparse.Namespace, precision: str, rank: int) -> None:
    torch.set_num_threads(args.threads)
    case = Case(args.model, DTYPES[precision], rank, args.device)
    prepare, call = case.contenders[name]
    with torch.no_grad(), prepare():
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            sender.send((torch.cuda.max_memory_allocated() - before) / 2**20)
            return
        # What earlier steps have freed but the allocator has kept would hide what the call needs.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident_mib("VmRSS")
        call()
        sender.send(resident_mib("VmHWM") - before)


def resident_mib(field: str) -> float:
    """A line of /proc/self/status."""
    return int(re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.M)[1]) / 1024  # type: ignore[index]


def describe(name: str, result: dict[str, Any]) -> str:
    """One line: the time, its ratio to PEFT's and to the copy's, and the memory."""
    entry = result[name]
    kind = "device_seconds" if "device_seconds" in entry else "seconds"
    median = entry[kind]["median"]
    return (
        f"{name:24} {1e3 * median:9.2f} ms  {median / result['copy'][kind]['median']:6.2f} x copy  "
        f"{result['PEFT merge_and_unload']['seconds']['median'] / entry['seconds']['median']:6.2f} x faster than PEFT  "
        f"{entry['added_memory_mib']:8.1f} MiB"
    )


def main() -> None:
    """Run the case and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default="vit_large_patch16_224")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 16, on a GPU 16 and 128")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precisions", nargs="+", choices=list(DTYPES), default=["bf16", "fp32"])
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("GPU: not measured, no CUDA device is visible")
        return
    torch.set_num_threads(args.threads)
    extension = slora.merging.extension_info()
    if not extension["available"]:
        raise SystemExit(f"slora._C cannot be used: {extension['reason']}; nothing was timed")
    ranks = args.ranks or ([16, 128] if args.device == "cuda" else [16])
    rows: list[dict[str, Any]] = []
    for precision in args.precisions:
        for rank in ranks:
            result = measure(args, precision, rank)
            for name, measures in result.items():
                print(f"{precision} r = {rank:<4} {describe(name, result)}")
                rows.append(
                    {"point": {"model": args.model, "dtype": precision, "rank": rank}, "contender": name, **measures}
                )
    settings = {"model": args.model, "rounds": args.rounds, "threads": args.threads}
    payload = {"complete": True, "settings": settings, "extension": extension, "rows": rows}
    if args.device == "cpu":
        payload["gpu"] = "not measured"
    folder = "cpu" if args.device == "cpu" else re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    print(write_result("merge", folder, payload))


if __name__ == "__main__":
    main()
