"""Trains a model under FSDP2's `fully_shard` and alone, and tells what both give, for test_fsdp.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import slora
from slora.gates.values import gate_values, gates, set_gates
from slora.layers import adapted_layers


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)], nn.Linear(8, 3))


def made(inactive: str) -> nn.Sequential:
    config = slora.SelectiveLoRAConfig(
        r=2, target_modules=[f"{i}.0" for i in range(4)], modules_to_save=["4"], blocks=2, inactive=inactive,
        probe_every=2, probe_rows=100,
    )  # fmt: skip
    return slora.inject(plain(), config)


def by_parts(model: nn.Sequential) -> nn.Sequential:
    for part in model[:-1]:
        fully_shard(part)
    return whole(model)


def whole(model: nn.Sequential) -> nn.Sequential:
    fully_shard(model)
    return model


SHARDED = {"whole": whole, "by parts": by_parts}
# Every way to shard, policy of inactive blocks and rule of the gates with each of the others.
CASES = [
    (sharded, inactive, ("penalty", "proximal")[(i + j) % 2])
    for i, sharded in enumerate(SHARDED)
    for j, inactive in enumerate(("probe", "exact", "frozen"))
]


def batch(generator: torch.Generator, rank: int, world: int) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(8, 8, generator=generator), torch.randint(3, (8,), generator=generator)
    return x.chunk(world)[rank], y.chunk(world)[rank]


def trained(model: nn.Sequential, rank: int, world: int, rule: str) -> dict[str, Any]:
    """What ten steps make of it, in which gates cross the threshold by themselves, and one by hand."""
    proximal = rule == "proximal"
    groups = slora.parameter_groups(model, lr=0.2, gate_lr=None if proximal else 0.06)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(groups, lr=0.2)]
    if proximal:
        optimizers.append(slora.ProximalGates(gates(model), lr=0.06, penalty=1.0))
    generator = torch.Generator().manual_seed(1)
    active = []
    for step in range(10):
        if step == 5:
            with torch.no_grad():
                next(adapted_layers(model))[1].gate.mul_(0.0).add_(0.2)
        x, y = batch(generator, rank, world)
        loss = nn.functional.cross_entropy(model(x), y)
        if not proximal:
            loss = loss + slora.gate_penalty(model)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        active.append(torch.cat(list(slora.active_blocks(model).values())).tolist())
    moved = next(adapted_layers(model))[1].gate_cache.step
    return {"gates": gate_values(model), "active": active, "output": model(probe()).tolist(), "moved": moved}


def probe() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(2))


def chosen(model: nn.Sequential, rank: int, world: int) -> dict[str, Any]:
    """What a budget leaves, by solo gain on the same samples in all processes."""
    generator = torch.Generator().manual_seed(1)
    x, y = batch(torch.Generator().manual_seed(3), 0, 1)
    ranking = slora.selection.SoloGain(lambda: nn.functional.cross_entropy(model(x), y))
    selection = slora.selection.Budget(model, 3, 10, ranking=ranking)
    optimizer = torch.optim.SGD(slora.parameter_groups(model, lr=0.5))
    for _ in range(10):
        x_own, y_own = batch(generator, rank, world)
        nn.functional.cross_entropy(model(x_own), y_own).backward()
        optimizer.step()
        optimizer.zero_grad()
        selection.step()
    selection.finish()
    return {
        "active": torch.cat(list(slora.active_blocks(model).values())).tolist(),
        "output": model(probe()).tolist(),
        "summary": str(slora.summary(model)),
    }


def by_sensitivity(model: nn.Sequential) -> slora.selection.Strategy:
    x, y = batch(torch.Generator().manual_seed(3), 0, 1)
    return slora.selection.Sensitivity(
        model, 3, 1, batches=[(x, y)], loss=lambda x, y: nn.functional.cross_entropy(model(x), y)
    )


def kept(selection: slora.selection.Strategy, model: nn.Sequential) -> list[bool]:
    """The blocks that it leaves at the end, on `model` or on what it has become since."""
    selection.step()
    selection.finish()
    on: list[bool] = torch.cat(list(slora.active_blocks(model).values())).tolist()
    return on


def saved(model: nn.Sequential, folder: Path) -> dict[str, Any]:
    """Outputs of a sharded model, of a plain one with its adapter merged, and of another sharded one that loads it."""
    before = model(probe()).tolist()
    slora.save_adapter(model, folder)
    alone = slora.merge_and_unload(slora.load_adapter(plain(), folder))
    other = made("probe")
    by_parts(other)
    slora.load_adapter(other, folder)
    return {"before": before, "merged": alone(probe()).tolist(), "loaded": other(probe()).tolist()}


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except slora.SLoRAError as error:
        return str(error)
    return ""


def results(rank: int, folder: Path) -> dict[str, Any]:
    """What this process finds."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    for name, inactive, rule in CASES:
        results[f"{name} {inactive} {rule}"] = [
            trained(SHARDED[name](made(inactive)), rank, 2, rule), trained(made(inactive), 0, 1, rule),
        ]  # fmt: skip
    for name, shard in SHARDED.items():
        model = shard(made("frozen"))
        results[f"{name} budget"] = [chosen(model, rank, 2), chosen(made("frozen"), 0, 1)]
        results[f"{name} saved"] = saved(model, folder / name.replace(" ", "-"))
    # 0.09999 is above the threshold in bf16.
    low = made("exact")
    fully_shard(low, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    set_gates({layer: [0.09999, 0.2] for _, layer in adapted_layers(low)})
    low(probe()).float().sum().backward()
    results["rounded"] = torch.cat(list(slora.active_blocks(low).values())).tolist()
    results["refused"] = {
        "merge": refused(lambda: slora.merge(model)),
        "unload": refused(lambda: slora.unload(model)),
        "release": refused(lambda: slora.release_frozen(model)),
        "inject": refused(lambda: slora.inject(whole(plain()))),
        "sensitivity": refused(lambda: by_sensitivity(model)),
    }
    results["fixed"] = kept(slora.selection.Last(model, 3, 1), model)
    for name, shard in SHARDED.items():
        before = made("probe")
        results[f"{name} sensitivity"] = [kept(by_sensitivity(m := made("probe")), m)]
        results[f"{name} sensitivity"].append(kept(by_sensitivity(before), shard(before)))
    set_gates({layer: [0.0, 0.0] for _, layer in adapted_layers(model)})
    with torch.no_grad():
        results["off"] = [model(probe()).tolist(), slora.disabled(model).__enter__()(probe()).tolist()]
    return results
