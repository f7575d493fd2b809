"""What is checked of one architecture: the same bits, the right values, and that every change can be undone.

The right values are computed here, in fp64, by the plain model with `W + c B A` in place of every adapted weight.
Rounding (1e-16 of a value, 1e-13 after a whole model) is then far below the tolerance: half of all digits of the dtype
that a value is stored in, which is fp32 for the gradients of blocks. What fp32 sums is compared where a bound is known:
in the merged weights.
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
from benchmarks.compatibility import model_under_test as tested
from benchmarks.compatibility.model_under_test import ModelUnderTest, Skip
from slora.errors import SLoRAError
from slora.layers import LoRABlocks, adapted_layers

RANK = 2
# The norm of every update over that of its weight: large enough to show in the output, too small to upset the model.
UPDATE = 0.1
# Half of all digits.
TOLERANCE = {dtype: torch.finfo(dtype).eps ** 0.5 for dtype in (torch.float32, torch.float64)}
# Of the mismatches of one architecture.
SHOWN = 3
Row = dict[str, Any]


def check(build: Callable[[], ModelUnderTest], folder: Path) -> Row:
    """Check one architecture, with files in `folder`; return "verdict", "reason", and what was counted until then.

    Verdicts: "right"; "nothing" to adapt; "refused" by slora, in its own words; "skipped", because it cannot be built
    or run without slora either; "wrong"; "failed", with an error that is none of slora's.
    """
    row: Row = {"step": "building it", "mismatches": []}
    # PyTorch's fused attention in eval mode, which adapted modules do not use, adds in another order.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        _check(build(), folder, row)
        found = row["mismatches"]
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        row |= {"verdict": "wrong" if found else "right", "reason": "; ".join(found[:SHOWN]) + more}
    except Skip as reason:
        row |= {"verdict": reason.verdict, "reason": str(reason)}
    except SLoRAError as error:
        row |= {"verdict": "refused", "reason": f"{row['step']}: {error}"}
    except Exception as error:
        without_slora = row["step"] in ("building it", "the base model alone")
        what = f"{row['step']}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        row |= {"verdict": "skipped" if without_slora else "failed", "reason": what}
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    del row["step"], row["mismatches"]
    # JSON has no NaN; a mismatch says it already.
    return {key: value for key, value in row.items() if not (isinstance(value, float) and not math.isfinite(value))}


def _check(test: ModelUnderTest, folder: Path, row: Row) -> None:
    """Fill `row` with what is counted, and its "mismatches" with sentences; "step" is what is being done."""
    model = test.model
    row |= {"model": test.name, "parameters": tested.parameter_count(model)}
    linear = tested.linear_layers(model)
    if not linear:
        row["elsewhere"] = tested.not_adapted(model)
        raise tested.NothingToAdapt("no linear layer below the head")

    row["step"] = "the base model alone"
    tested.randomize_constants(model)
    reached = _learning(test, model)
    model.zero_grad()
    model.eval()
    plain, flags = copy.deepcopy(model), [p.requires_grad for p in model.parameters()]
    before = test.outputs(model)
    if not _finite(before):
        raise Skip("the base model's own output is not finite")
    if not _same(before, test.outputs(model)):
        raise Skip("the base model's own output differs from call to call")

    row["step"] = "inject"
    thin = {name: 1 for name, m in linear.items() if isinstance(m, nn.Linear) and min(m.weight.shape) < RANK}
    slora.inject(model, slora.SelectiveLoRAConfig(r=RANK, lora_alpha=8, rank_pattern=thin or None))
    layers = dict(adapted_layers(model))
    row |= {"adapted": len(layers), "elsewhere": tested.not_adapted(model)}
    _require(row, _same(before, test.outputs(model)), "after inject the output has other bits")
    for layer in layers.values():
        _fill(layer)

    row["step"] = "a training step"
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(slora.parameter_groups(twin, lr=1e-3))
    learning = _learning(test, twin)
    for name, layer in layers.items():
        learns = {f"{name}.{block}" for block in ("lora_A", "lora_B", "gate")} <= learning
        expected = f"{name}.{layer.weight_name}" in reached
        _require(row, learns or not expected, f"{name} gets no gradient in training")
    optimizer.step()
    _require(row, _finite(twin.parameters()), "a training step gives what is not finite")

    row["step"] = "comparing with W + cBA"
    _compare(test, plain, model, row)

    row["step"] = "merging"
    unmerged = test.outputs(model)
    _merge(test, plain, model, unmerged, row)

    row["step"] = "saving and loading"
    slora.save_adapter(model, folder)
    loaded = slora.load_adapter(copy.deepcopy(plain), folder)
    _require(row, _same(unmerged, test.outputs(loaded)), "loaded from a file it gives another output")

    row["step"] = "unloading"
    slora.unload(model)
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        # PyTorch chooses by it how it multiplies.
        parameter.requires_grad_(flag)
    _require(row, _same(before, test.outputs(model)), "unloaded it gives another output than the base model")
    _require(row, _same(plain.parameters(), model.parameters()), "unload leaves other weights")


def _learning(test: ModelUnderTest, model: nn.Module) -> set[str]:
    """The parameters that get a gradient in a training step."""
    _loss(test.outputs(model.train(), grad=True)).backward()
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, p in named if p.grad is not None and p.grad.any()}


def _compare(test: ModelUnderTest, plain: nn.Module, model: nn.Module, row: Row) -> None:
    """Output, gradients and merged output against the plain model with `W + c B A` in place of its weights."""
    for dtype in (torch.float64, torch.float32):
        reference = copy.deepcopy(plain).to(dtype)
        exact = {name: [p.detach().to(dtype).requires_grad_() for p in _blocks(m)] for name, m in adapted_layers(model)}
        weights = {}
        for name, layer in adapted_layers(model):
            A, B, gate = exact[name]
            # An active block counts as 1, and the gradient of its gate is that of a factor.
            indicator = (1 + gate - gate.detach())[:, None, None]
            weights[name] = _weight(reference, name, layer).detach() + _update(layer, A, indicator * B)
        # Some models create fp32 tensors, or masks of the least fp32 number.
        with contextlib.suppress(RuntimeError):
            expected = test.outputs(_with_weights(reference, model, weights), grad=True)
            _loss(expected).backward()
            gradients = [p.grad for blocks in exact.values() for p in blocks if p.grad is not None]
            if _finite([*expected, *gradients]):
                break
    else:
        raise Skip("the base model with other weights gives what is not finite")
    twin, tolerance = copy.deepcopy(model).to(dtype), TOLERANCE[dtype]
    outputs = test.outputs(twin, grad=True)
    _loss(outputs).backward()
    row |= {"compared_in": str(dtype).removeprefix("torch."), "deviation": _deviation(outputs, expected)}
    _require(row, row["deviation"] <= tolerance, f"the output deviates by {row['deviation']:.1e}")
    row |= {"reached": 0, "unreached": []}
    # Gradients far below the largest of their kind hold nothing but rounding.
    largest = [max(_norm(p.grad) for p in kind) for kind in zip(*exact.values(), strict=True)]
    for name, layer in adapted_layers(twin):
        _, B, _ = exact[name]
        if not _norm(B.grad):
            row["unreached"].append(name)
        if B.grad is None or layer.lora_B.grad is None:
            _require(row, B.grad is None, f"{name} is read past its blocks")
            continue
        row["reached"] += 1
        half = TOLERANCE[layer.gate.dtype]
        # The gate's gradient, an inner product of B and its gradient, may be small by chance, but is no more exact.
        floor_A, floor_B = (tolerance * size for size in largest[:2])
        floors = floor_A, floor_B, max(half * _norm(B.grad), floor_B) * _norm(B)
        for what, p, wanted, floor in zip(("A", "B", "gate"), _blocks(layer), exact[name], floors, strict=True):
            found = () if p.grad is None or wanted.grad is None else (p.grad, wanted.grad)
            error = _deviation(found[:1], found[1:], floor) if found else math.inf
            _require(row, error <= half, f"the gradient of {what} of {name} deviates by {error:.1e}")
    error = _deviation(test.outputs(slora.merge(twin)), expected)
    _require(row, error <= tolerance, f"the merged output deviates by {error:.1e}")


def _merge(test: ModelUnderTest, plain: nn.Module, model: nn.Module, unmerged: list[Tensor], row: Row) -> None:
    """Merged weights within the rounding of their sums, and the output of a plain model with them; then unmerge."""
    slora.merge(model)
    merged = test.outputs(model)
    row["merge_error"] = _deviation(merged, unmerged)
    weights = {}
    for name, layer in adapted_layers(model):
        weights[name] = layer.base_weight.detach().clone().requires_grad_()
        W, A, B = (p.detach().double() for p in (_weight(plain, name, layer), layer.lora_A, layer.lora_B))
        # r products and the base weight: as many additions as products, each rounded, and as many products.
        bound = (layer.r + 2) * torch.finfo(torch.float32).eps / 2 * (W.abs() + _update(layer, A.abs(), B.abs()))
        excess = (layer.base_weight.double() - W - _update(layer, A, B)).abs() > bound
        _require(row, not excess.any(), f"merged weights of {name} are not W + cBA")
    direct = test.outputs(_with_weights(copy.deepcopy(plain), model, weights))
    _require(row, _same(merged, direct), "merged it gives another output than a plain model with the merged weights")
    slora.unmerge(model)
    _require(row, _same(unmerged, test.outputs(model)), "unmerged it gives another output than before")


def _require(row: Row, holds: bool, otherwise: str) -> None:
    if not holds:
        row["mismatches"].append(otherwise)


@torch.no_grad()
def _fill(layer: LoRABlocks) -> None:
    """Random blocks whose update has the norm `UPDATE` over that of the weight."""
    layer.lora_B.normal_()
    W = layer.base_weight
    layer.lora_B.mul_(UPDATE * (_norm(W) or W.numel() ** 0.5) / _norm(_update(layer, layer.lora_A, layer.lora_B)))


def _blocks(layer: LoRABlocks) -> tuple[Tensor, Tensor, Tensor]:
    return layer.lora_A, layer.lora_B, layer.gate


def _update(layer: LoRABlocks, A: Tensor, B: Tensor) -> Tensor:
    """`c B A` of all blocks."""
    return layer.scaling * (B @ A).flatten(0, 1)


def _weight(plain: nn.Module, name: str, layer: LoRABlocks) -> Tensor:
    weight: Tensor = getattr(plain.get_submodule(name), layer.weight_name)
    return weight


def _with_weights(plain: nn.Module, model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Replace the weights of `plain` at the layers adapted in `model`, there alone where they are shared; return it.

    The parameters that are left are trainable where they are so in `model`: PyTorch chooses by it how it multiplies.
    """
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    for name, layer in adapted_layers(model):
        module = plain.get_submodule(name)
        del module._parameters[layer.weight_name]
        setattr(module, layer.weight_name, weights[name])
    return plain


def _loss(outputs: Iterable[Tensor]) -> Tensor:
    """The mean square of the distance to random targets: that to 0 says nothing of outputs that are normalised."""
    torch.manual_seed(2)
    differences = [t - torch.randn(t.shape).to(t.dtype) for t in outputs if t.requires_grad]
    return torch.stack([d.square().mean() for d in differences]).sum()


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors)


def _norm(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else float(tensor.detach().double().norm())


def _same(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _deviation(values: Iterable[Tensor], exact: Iterable[Tensor], floor: float = 0.0) -> float:
    """The largest norm of a difference over that of the exact value, or over `floor` where that is larger."""
    pairs = zip(values, exact, strict=True)
    return max(_norm(a.double() - e.double()) / max(_norm(e), floor, 1e-300) for a, e in pairs)
