"""Trains a model under every kind of DDP and alone, and tells how far they are apart, for test_ddp.py."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import slora
from slora.gates.values import gates, set_gates
from slora.layers import adapted_layers

KINDS: dict[str, dict[str, bool]] = {
    "defaults": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
}
# Every kind of DDP, policy of inactive blocks and rule of the gates with each of the others.
CASES = [
    (kind, inactive, ("penalty", "proximal")[(i + j) % 2])
    for i, kind in enumerate(KINDS)
    for j, inactive in enumerate(("probe", "exact", "frozen"))
]
# Of four layers with two blocks each, which are on in each step: layers go off and come back.
ACTIVE = ["11111111", "10110011", "00100011", "00000000", "10000100", "11111111"]


class Checkpointed(nn.Module):
    """A stack whose activations are computed again in the backward."""

    def __init__(self, stack: nn.Sequential, reentrant: bool) -> None:
        super().__init__()
        self.stack, self.reentrant = stack, reentrant

    def forward(self, x: Tensor) -> Tensor:
        x.requires_grad_(self.reentrant)
        for part in self.stack[:-1]:
            x = checkpoint(part, x, use_reentrant=self.reentrant)
        return self.stack[-1](x)


def made(inactive: str) -> nn.Sequential:
    torch.manual_seed(0)
    stack = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)], nn.Linear(8, 3))
    config = slora.SelectiveLoRAConfig(
        r=2, target_modules=[f"{i}.0" for i in range(4)], modules_to_save=["4"], blocks=2, inactive=inactive,
        probe_every=2, probe_rows=100,
    )  # fmt: skip
    return slora.inject(stack, config)


def trained(
    model: nn.Module, stack: nn.Sequential, rank: int, world: int, rule: str, accumulation: int, active: list[str]
) -> Tensor:
    """The parameters after a step for each entry of `active`; alone, a process takes the rows of all."""
    proximal = rule == "proximal"
    # Momentum and decay move a matrix that gets zeros, and leave alone what gets no gradient.
    groups = slora.parameter_groups(stack, lr=0.05, gate_lr=None if proximal else 0.01, weight_decay=0.1)
    weights = torch.optim.SGD([{"momentum": 0.9, **group} for group in groups], lr=0.05)
    own = slora.ProximalGates(gates(stack), lr=0.01, penalty=1.0) if proximal else None
    generator = torch.Generator().manual_seed(1)
    for on in active:
        flags = iter(on)
        set_gates(
            {layer: [0.15 if next(flags) == "1" else 0.05 for _ in range(2)] for _, layer in adapted_layers(stack)}
        )
        for part in range(accumulation):
            x = torch.randn(8, 8, generator=generator).chunk(world)[rank]
            y = torch.randint(3, (8,), generator=generator).chunk(world)[rank]
            alone = part == accumulation - 1 or not isinstance(model, DistributedDataParallel)
            with contextlib.nullcontext() if alone else model.no_sync():
                loss = nn.functional.cross_entropy(model(x), y) / accumulation
                if not proximal:
                    loss = loss + 0.5 * slora.gate_penalty(stack)
                loss.backward()
        for optimizer in (weights, own) if own else (weights,):
            optimizer.step()
            optimizer.zero_grad()
    return flat(stack)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def chosen(model: nn.Module, stack: nn.Sequential, rank: int, world: int, strategy: str) -> list[bool]:
    """The active blocks after a run in which a strategy takes the gates out of training after DDP was made."""
    steps, generator = 8, torch.Generator().manual_seed(1)
    selection: Any = (
        slora.selection.Budget(model, 3, steps)
        if strategy == "budget"
        else slora.selection.Gates(model, steps, penalty=20.0)
    )
    optimizer = torch.optim.SGD(slora.parameter_groups(stack, lr=0.5, gate_lr=0.005))
    for _ in range(steps):
        x = torch.randn(8, 8, generator=generator).chunk(world)[rank]
        (model(x).square().mean() + (selection.penalty() if strategy == "gates" else 0.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        selection.step()
        if strategy == "gates":
            slora.release_frozen(stack, optimizer)
    selection.finish()
    return torch.cat(list(slora.active_blocks(stack).values())).tolist()


def results(rank: int) -> dict[str, Any]:
    """What this process finds."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    apart: list[float] = []

    def compare(name: str, model: nn.Module, stack: nn.Sequential, inactive: str, *arguments: Any) -> None:
        try:
            found = trained(model, stack, rank, 2, *arguments)
        except (RuntimeError, ValueError) as error:
            results[name] = str(error).strip().splitlines()[0]
            return
        alone = made(inactive)
        results[name] = float((found - trained(alone, alone, 0, 1, *arguments)).abs().max())
        both = [torch.empty_like(found) for _ in range(2)]
        dist.all_gather(both, found)
        apart.append(float((both[0] - both[1]).abs().max()))

    for kind, inactive, rule in CASES:
        stack = made(inactive)
        model = DistributedDataParallel(stack, **KINDS[kind])
        # With a static graph DDP wants its first backward to be one that sums: pytorch's own limit.
        accumulation = 1 if kind == "static" or rule == "proximal" else 2
        compare(f"{kind} {inactive} {rule}", model, stack, inactive, rule, accumulation, ACTIVE)
    for kind, options in KINDS.items():
        for strategy in ("budget", "gates"):
            stack, alone = made("frozen"), made("frozen")
            try:
                found = chosen(DistributedDataParallel(stack, **options), stack, rank, 2, strategy)
                results[f"{kind} {strategy}"] = [found, chosen(alone, alone, 0, 1, strategy)]
            except (RuntimeError, ValueError) as error:
                results[f"{kind} {strategy}"] = str(error).strip().splitlines()[0]
    for reentrant in (False, True):
        stack = made("frozen")
        model = DistributedDataParallel(Checkpointed(stack, reentrant))
        name = f"checkpointing {'reentrant' if reentrant else 'not reentrant'}"
        compare(name, model, stack, "frozen", "proximal", 1, ACTIVE)
    results["apart"] = max(apart, default=None)

    # A gate that "frozen" has switched off, beside one that is on.
    stack = made("frozen")
    trained(DistributedDataParallel(stack), stack, rank, 2, "proximal", 1, ["10111111"])
    results["dead"] = gates(stack)[0].tolist()
    return results
