"""What is asked of one architecture: the same bits, the right values, and what it gives back.

The right values are computed here, in fp64, by the plain model with `W + c B A` in place of every adapted weight.
Rounding (1e-16 of a value, 1e-13 after a whole model) is then far below what is compared: half of all digits of the
dtype that a value is kept in, which is fp32 for the gradients of blocks. What fp32 sums is compared where a bound is
known: in the merged weights.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slora
from benchmarks.compatibility.subject import Nothing, Skip, Subject, elsewhere, enliven, linear_layers, parameter_count
from slora.errors import SLoRAError
from slora.layers import LoRABlocks, adapted_layers

RANK = 2
# The update's part of each weight, by norm: enough to be seen in the output, too little to upset the model.
UPDATE = 0.1
# Of the faults of one architecture.
SHOWN = 3
Row = dict[str, Any]


def examine(build: Callable[[], Subject], folder: Path) -> Row:
    """Return what there is to say of an architecture: "verdict" and "reason", and what was counted until then.

    Verdicts: "right"; "nothing" to adapt; "refused" by slora, with its own words; "skipped", because it cannot be
    built or run without slora either; "wrong"; "failed", with an error that is none of slora's.
    """
    row: Row = {"stage": "building it", "faults": []}
    # PyTorch's fused kernels for attention in eval mode, which adapted modules do not use, add in another order.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        _examine(build(), folder, row)
        faults = row["faults"]
        more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        row |= {"verdict": "wrong" if faults else "right", "reason": "; ".join(faults[:SHOWN]) + more}
    except Skip as reason:
        row |= {"verdict": "nothing" if isinstance(reason, Nothing) else "skipped", "reason": str(reason)}
    except SLoRAError as error:
        row |= {"verdict": "refused", "reason": f"{row['stage']}: {error}"}
    except Exception as error:
        own = row["stage"] in ("building it", "the base model alone")
        what = f"{row['stage']}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        row |= {"verdict": "skipped" if own else "failed", "reason": what}
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    # What is no number has a fault of its own, and no place in a file.
    kept = {key: value for key, value in row.items() if not (isinstance(value, float) and not math.isfinite(value))}
    return {key: value for key, value in kept.items() if key not in ("stage", "faults")}


def _examine(subject: Subject, folder: Path, row: Row) -> None:
    model = subject.model
    row |= {"model": subject.name, "parameters": parameter_count(model)}

    linear = linear_layers(model)
    if not linear:
        row |= {"elsewhere": elsewhere(model)}
        raise Nothing("no linear layer below the head")

    row["stage"] = "the base model alone"
    enliven(model)
    trained = _gradients(subject, model.train())
    model.eval()
    plain, flags = copy.deepcopy(model), [p.requires_grad for p in model.parameters()]
    before = subject.outputs(model)
    if not all(t.isfinite().all() for t in before):
        raise Skip("the base model's own output is not finite")
    if not _same(before, subject.outputs(model)):
        raise Skip("the base model's own output differs from call to call")

    row["stage"] = "inject"
    thin = {n: 1 for n, m in linear.items() if isinstance(m, nn.Linear) and min(m.weight.shape) < RANK}
    slora.inject(model, slora.SelectiveLoRAConfig(r=RANK, lora_alpha=8, rank_pattern=thin or None))
    layers = dict(adapted_layers(model))
    row |= {"adapted": len(layers), "elsewhere": elsewhere(model)}
    _require(row, _same(before, subject.outputs(model)), "after inject the output has other bits")
    for layer in layers.values():
        _fill(layer)

    row["stage"] = "a training step"
    _train(subject, copy.deepcopy(model).train(), trained, row)

    row["stage"] = "comparing with W + cBA"
    changed = {name: _weight(plain, name, layer).double() + _update(layer) for name, layer in layers.items()}
    _compare(subject, plain, model, changed, row)

    row["stage"] = "merging"
    unmerged = subject.outputs(model)
    _merge(subject, plain, model, changed, unmerged, row)

    row["stage"] = "saving and loading"
    slora.save_adapter(model, folder)
    loaded = slora.load_adapter(copy.deepcopy(plain), folder)
    _require(row, _same(unmerged, subject.outputs(loaded)), "loaded from a file it gives another output")

    row["stage"] = "unloading"
    slora.unload(model)
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        # By which PyTorch chooses how it multiplies.
        parameter.requires_grad_(flag)
    _require(row, _same(before, subject.outputs(model)), "unloaded it gives another output than the base model")
    _require(row, _same(plain.parameters(), model.parameters()), "unload leaves other weights")


def _train(subject: Subject, model: nn.Module, used: dict[str, bool], row: Row) -> None:
    """One step of AdamW: every layer that the base model's own step reaches has gradients, and stays finite."""
    optimizer = torch.optim.AdamW(slora.parameter_groups(model, lr=1e-3))
    _loss(subject.graph(model)).backward()
    for name, layer in adapted_layers(model):
        parts = (layer.lora_A, layer.lora_B, layer.gate)
        reached = all(p.grad is not None and bool(p.grad.any()) for p in parts)
        _require(row, reached or not used[f"{name}.{layer.weight_name}"], f"{name} gets no gradient in training")
    optimizer.step()
    _require(row, all(bool(p.isfinite().all()) for p in model.parameters()), "a training step gives what is not finite")


def _compare(subject: Subject, plain: nn.Module, model: nn.Module, changed: dict[str, Tensor], row: Row) -> None:
    """Output and gradients, and the merged output, against the plain model with other weights."""
    for dtype in (torch.float64, torch.float32):
        # Some models make fp32 tensors, or masks of the least fp32 number, of their own.
        reference = _with_weights(copy.deepcopy(plain).to(dtype), model, changed)
        with contextlib.suppress(RuntimeError):
            expected = subject.graph(reference)
            _loss(expected).backward()
            exact = {name: _weight(reference, name, layer).grad for name, layer in adapted_layers(model)}
            if all(bool(t.isfinite().all()) for t in (*expected, *exact.values()) if t is not None):
                break
    else:
        raise Skip("the base model with other weights gives what is not finite")
    twin, tolerance = copy.deepcopy(model).to(dtype), _half_of_all_digits(dtype)
    outputs = subject.graph(twin)
    _loss(outputs).backward()
    row |= {"compared_in": str(dtype).removeprefix("torch."), "deviation": _deviation(outputs, expected)}
    _require(row, row["deviation"] <= tolerance, f"the output deviates by {row['deviation']:.1e}")
    largest = max((float(dW.norm()) for dW in exact.values() if dW is not None), default=0.0)
    row["reached"], row["unreached"] = 0, []
    for name, layer in adapted_layers(twin):
        dW = exact[name]
        if dW is None or not dW.any():
            row["unreached"].append(name)
        if dW is None or layer.lora_B.grad is None:
            _require(row, dW is None, f"{name} is read past its blocks")
            continue
        row["reached"] += 1
        # Below this part of the largest gradient there is nothing but rounding.
        _compare_gradients(row, name, layer, dW * layer.scaling, tolerance * largest * layer.scaling)
    error = _deviation(subject.outputs(slora.merge(twin)), expected)
    _require(row, error <= tolerance, f"the merged output deviates by {error:.1e}")


def _compare_gradients(row: Row, name: str, layer: LoRABlocks, dW: Tensor, floor: float) -> None:
    """The gradients of A, B and the gates against those that the gradient `dW` of `c B A` gives."""
    A, B, dW = (t.detach().to(dW.dtype) for t in (layer.lora_A, layer.lora_B, dW.view(layer.blocks, -1, dW.shape[1])))
    dA, dB = B.mT @ dW, dW @ A.mT
    dgate = (dB * B).sum((1, 2))
    half = _half_of_all_digits(layer.gate.dtype)
    least = floor * float(B.norm()), floor * float(A.norm())
    # An inner product may be small by chance, but is no more exact for that.
    floors = *least, max(half * float(dB.norm()), least[1]) * float(B.norm())
    parts = (layer.lora_A, layer.lora_B, layer.gate)
    for what, p, wanted, smallest in zip(("A", "B", "gate"), parts, (dA, dB, dgate), floors, strict=True):
        error = _deviation([p.grad], [wanted], smallest) if p.grad is not None else math.inf
        _require(row, error <= half, f"the gradient of {what} of {name} deviates by {error:.1e}")


def _merge(
    subject: Subject, plain: nn.Module, model: nn.Module, changed: dict[str, Tensor], unmerged: list[Tensor], row: Row
) -> None:
    """Merged weights within the rounding of their sums, the merged output that of a plain model with them; undone."""
    slora.merge(model)
    merged = subject.outputs(model)
    row["merge_error"] = _deviation(merged, unmerged)
    for name, layer in adapted_layers(model):
        # r products and the base weight: as many additions as products, each rounded, and as many products.
        terms = _weight(plain, name, layer).abs() + _update(layer, torch.abs)
        bound = (layer.r + 2) * torch.finfo(torch.float32).eps / 2 * terms
        excess = (layer.base_weight.double() - changed[name]).abs() > bound
        _require(row, not excess.any(), f"merged weights of {name} are not W + cBA")
    weights = {name: layer.base_weight.detach().clone() for name, layer in adapted_layers(model)}
    direct = subject.outputs(_with_weights(copy.deepcopy(plain), model, weights))
    _require(row, _same(merged, direct), "merged it gives another output than a plain model with the merged weights")
    slora.unmerge(model)
    _require(row, _same(unmerged, subject.outputs(model)), "unmerged it gives another output than before")


def _require(row: Row, holds: bool, otherwise: str) -> None:
    if not holds:
        row["faults"].append(otherwise)


@torch.no_grad()
def _fill(layer: LoRABlocks) -> None:
    layer.lora_B.normal_()
    update, W = _update(layer), layer.base_weight
    size = float(W.norm()) or W.numel() ** 0.5
    layer.lora_B.mul_(UPDATE * size / float(update.norm()))


def _update(layer: LoRABlocks, of: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
    """`c B A` in fp64; all blocks are active."""
    A, B = (of(p.detach().double()) for p in (layer.lora_A, layer.lora_B))
    return torch.cat([layer.scaling * B_i @ A_i for A_i, B_i in zip(A, B, strict=True)])


def _weight(plain: nn.Module, name: str, layer: LoRABlocks) -> Tensor:
    weight: Tensor = getattr(plain.get_submodule(name), layer.weight_name)
    return weight


def _with_weights(plain: nn.Module, model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Give `plain` other weights at the adapted layers, and there only, whoever shares the old ones, and return it.

    They are trainable, everything else is what it is in `model`: PyTorch chooses how it multiplies by that, and adapted
    layers multiply as trainable ones.
    """
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    for name, layer in adapted_layers(model):
        weight = weights[name].to(_weight(plain, name, layer).dtype)
        setattr(plain.get_submodule(name), layer.weight_name, nn.Parameter(weight))
    return plain


def _gradients(subject: Subject, model: nn.Module) -> dict[str, bool]:
    """Which parameters get a gradient in the model's own training step."""
    _loss(subject.graph(model)).backward()
    found = {
        name: p.grad is not None and bool(p.grad.any()) for name, p in model.named_parameters(remove_duplicate=False)
    }
    model.zero_grad()
    return found


def _loss(outputs: Iterable[Tensor]) -> Tensor:
    """The mean square of the distance to random targets: that to 0 says nothing of outputs that are normalised."""
    torch.manual_seed(2)
    differences = [t - torch.randn(t.shape).to(t.dtype) for t in outputs if t.requires_grad]
    return torch.stack([d.square().mean() for d in differences]).sum()


def _half_of_all_digits(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps ** 0.5)


def _same(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _deviation(values: list[Tensor], exact: list[Tensor], floor: float = 0.0) -> float:
    """The largest norm of a difference over that of the exact value."""
    return max(
        float((a.detach().double() - e.detach().double()).norm())
        / max(float(e.detach().double().norm()), floor, 1e-300)
        for a, e in zip(values, exact, strict=True)
    )
