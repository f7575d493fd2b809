"""One training step of a timm vision transformer: slora beside PEFT and beside the limits, in one process.

    python -m benchmarks.train_step [--model vit_small_patch16_224] [--batch 16] [--rounds 15]

A step is forward, cross-entropy, backward and the optimizer's step. Contenders take turns within each round, so
a slow moment of the machine hits them all; medians and percentiles are over rounds. A `probe` contender probes
every tenth step: its rounds time whole cycles of ten steps and divide by ten. Peak memory is that of a process of
its own per contender. Nothing is timed before the adapted model's output was compared with the base model's.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import timm
import torch
from torch import nn
from torch.nn import functional as F

import slora
from benchmarks.record import spread, write_result

LINEARS = ["qkv", "proj", "fc1", "fc2"]
PRECISIONS = ("fp32", "bf16", "amp")


@dataclass(frozen=True)
class Contender:
    """A way to train: `prepare` gets the base model and returns the model to train."""

    name: str
    prepare: Callable[[nn.Module, argparse.Namespace], nn.Module]
    steps: int = 1
    input_gradient: bool = False


def last_two(model: nn.Module) -> list[str]:
    """Names of the `attn.proj` and `mlp.fc2` of the last two transformer blocks: 4 of 72 LoRA blocks at depth 12."""
    depth = len(model.blocks)  # type: ignore[arg-type]
    return [f"blocks.{i}.{part}" for i in range(depth - 2, depth) for part in ("attn.proj", "mlp.fc2")]


def frozen(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """Frozen weights; only the head is trained."""
    return model.requires_grad_(False).train() and _trainable_head(model)


def full(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """Full fine-tuning."""
    return model.requires_grad_(True)


def with_peft(names: Callable[[nn.Module], list[str]] | None) -> Callable[..., nn.Module]:
    """PEFT's LoRA on the named layers, or on all four linears of every block."""

    def prepare(model: nn.Module, args: argparse.Namespace) -> nn.Module:
        chosen = LINEARS if names is None else names(model)
        config = peft.LoraConfig(
            r=args.r, lora_alpha=args.r, target_modules=chosen, exclude_modules=["patch_embed.proj"]
        )
        # In a bf16 model its adapters would be fp32 and every input cast; both libraries get one dtype there.
        lora = args.precision != "bf16"
        return _trainable_head(peft.get_peft_model(model, config, autocast_adapter_dtype=lora))

    return prepare


def with_slora(active: str, inactive: str, blocks: Any = "auto") -> Callable[..., nn.Module]:
    """slora on all linears with all, the last two layers' or no blocks active."""

    def prepare(model: nn.Module, args: argparse.Namespace) -> nn.Module:
        keep = set(last_two(model))
        config = slora.SelectiveLoRAConfig(r=args.r, lora_alpha=args.r, inactive=inactive, blocks=blocks)  # type: ignore[arg-type]
        slora.inject(model, config)
        with torch.no_grad():
            for name, layer in slora.gate.adapted_layers(model):
                layer.gate.fill_(1.0 if active == "all" or (active == "few" and name in keep) else 0.0)
        return _trainable_head(model)

    return prepare


CONTENDERS = (
    Contender("head only", frozen),
    Contender("frozen, dx everywhere", frozen, input_gradient=True),
    Contender("full", full),
    Contender("PEFT, all", with_peft(None)),
    Contender("PEFT, few", with_peft(last_two)),
    Contender("slora, all active", with_slora("all", "probe")),
    Contender("slora, all active, qkv as one block", with_slora("all", "probe", 1)),
    Contender("slora, few active, frozen", with_slora("few", "frozen")),
    Contender("slora, few active, probe", with_slora("few", "probe"), steps=10),
    Contender("slora, none active, frozen", with_slora("none", "frozen")),
)


class Step:
    """One contender, ready to take training steps."""

    def __init__(self, contender: Contender, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        model = timm.create_model(args.model, num_classes=100)
        if args.precision == "bf16":
            model = model.to(torch.bfloat16)
        self.model = contender.prepare(model, args).train()
        self.amp = args.precision == "amp"
        groups = [p for p in self.model.parameters() if p.requires_grad]
        gates = {id(gate) for gate in slora.gate.gates(self.model)}
        # Gates stay where the contender put them, but take part in every step.
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in groups if id(p) not in gates]},
                {"params": [p for p in groups if id(p) in gates], "lr": 0.0, "weight_decay": 0.0},
            ]
        )
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        self.x = torch.randn(args.batch, 3, 224, 224, dtype=dtype, requires_grad=contender.input_gradient)
        self.target = torch.randint(0, 100, (args.batch,))
        self.count = contender.steps
        self.gated = bool(gates)

    def __call__(self) -> float:
        """Take `steps` training steps and return the seconds per step."""
        start = time.perf_counter()
        for _ in range(self.count):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
                loss = F.cross_entropy(self.model(self.x).float(), self.target)
                if self.gated:
                    loss = loss + 0.1 * slora.gate_penalty(self.model)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.x.grad = None
        return (time.perf_counter() - start) / self.count


def peak_memory(contender: Contender, args: argparse.Namespace) -> float:
    """Peak resident memory of three steps in a process of their own, in MiB."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_memory, args=(sender, contender.name, args))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{contender.name}: the process that measures memory ended with {process.exitcode}")
    return float(receiver.recv())


def _measure_memory(sender: Any, name: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    step = Step(next(c for c in CONTENDERS if c.name == name), args)
    for _ in range(3 if step.count == 1 else 1):
        step()
    sender.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def _trainable_head(model: nn.Module) -> nn.Module:
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    base.get_classifier().requires_grad_(True)  # type: ignore[operator]
    return model


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse to time an adapted model whose first output is not the base model's."""
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=100).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model(x)
        found = slora.inject(model, slora.SelectiveLoRAConfig(r=args.r))(x)
    if not torch.equal(expected, found):
        raise SystemExit("the adapted model does not compute what its base does; nothing was timed")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time all contenders at one precision."""
    chosen = [c for c in CONTENDERS if not args.only or any(part in c.name for part in args.only)]
    steps = {c.name: Step(c, args) for c in chosen}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for round_number in range(args.rounds):
        for name, step in steps.items():
            seconds[name].append(step())
        print(f"\r{args.precision}: round {round_number + 1} of {args.rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)
    del steps
    gc.collect()
    result: dict[str, Any] = {name: {"seconds": spread(values)} for name, values in seconds.items()}
    if args.memory:
        for contender in chosen:
            result[contender.name]["peak_memory_mib"] = peak_memory(contender, args)
    return result


def main() -> None:
    """Run the case and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--only", nargs="*", help="parts of contender names; nothing is written then")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    check_outputs(args)
    results = {}
    for precision in args.precisions:
        args.precision = precision
        results[precision] = measure(args)
        reference = results[precision].get("PEFT, all")
        for name, entry in results[precision].items():
            ratio = entry["seconds"]["median"] / reference["seconds"]["median"] if reference else float("nan")
            memory = f"{entry.get('peak_memory_mib', float('nan')):8.0f} MiB"
            print(f"{precision:5} {name:38} {entry['seconds']['median']:8.4f} s {ratio:6.3f} of PEFT {memory}")
    if not args.only:
        settings = {"model": args.model, "batch": args.batch, "r": args.r}
        print(write_result("train_step", "cpu", {"settings": settings, "results": results}))


if __name__ == "__main__":
    main()
