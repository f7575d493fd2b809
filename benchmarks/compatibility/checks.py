"""What is checked of one architecture: the same bits, the right values, and that every change can be undone.

The right values are computed here by the plain model with `W + c B A` in place of every adapted weight. All of it is in
fp64, where rounding (1e-13 of a value after a whole model) is far below the tolerance: half of all digits (of fp32 for
the gradients, which are stored so). A model that does not run in fp64 is checked in fp32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import slora
from slora.errors import SLoRAError
from slora.layers import adapted_layers
from slora.models.targets import head_names

RANK = 2
# The norm of every update over that of its weight: large enough to show in the output, too small to upset the model.
UPDATE = 0.1
# Of the mismatches of one architecture.
SHOWN = 3
Row = dict[str, Any]


class Skip(Exception):
    """Why an architecture cannot be checked, through no fault of slora's."""

    verdict = "skipped"


class NothingToAdapt(Skip):
    """There is no linear layer below the head."""

    verdict = "nothing"


class ModelUnderTest(NamedTuple):
    """A model with random weights, and what it is called with."""

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...] = ()
    named_inputs: dict[str, Tensor] = {}  # noqa: RUF012

    def outputs(self, model: nn.Module, grad: bool = False) -> list[Tensor]:
        """All floating-point tensors that `model` returns. What is random in it has the same seed in every call."""
        torch.manual_seed(0)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        inputs, named = tree_map_only(
            Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (self.inputs, self.named_inputs)
        )
        with torch.set_grad_enabled(grad):
            found = tree_leaves(model(*inputs, **named))
        return [t for t in found if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """What "all-linear" should find: linear layers and attention with a common projection, below the head."""
    heads = head_names(model)
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or "in_proj_weight" in module._parameters)
        and not any(f"{name}.".startswith(f"{head}.") for head in heads)
    }


def parameter_count(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())


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
    return row


def _check(test: ModelUnderTest, folder: Path, row: Row) -> None:
    """Fill `row` with what is counted, and its "mismatches" with sentences; "step" is what is being done."""
    linear, size = linear_layers(test.model), parameter_count(test.model)
    row["model"] = test.name
    if not linear:
        raise NothingToAdapt("no linear layer below the head")

    row["step"] = "the base model alone"
    plain = _prepared(test)
    model, tolerance = copy.deepcopy(plain), math.sqrt(torch.finfo(next(plain.parameters()).dtype).eps)
    before = test.outputs(model)
    if not _same(before, test.outputs(model)):
        raise Skip("the base model's own output differs from call to call")

    row["step"] = "inject"
    thin = {name: 1 for name, m in linear.items() if isinstance(m, nn.Linear) and min(m.weight.shape) < RANK}
    slora.inject(model, slora.SelectiveLoRAConfig(r=RANK, lora_alpha=8, rank_pattern=thin or None))
    layers = dict(adapted_layers(model))
    share = sum(layer.base_weight.numel() for layer in layers.values()) / size
    row |= {"adapted": len(layers), "share": round(share, 4), "compared_in": str(before[0].dtype).partition(".")[2]}
    _require(row, _same(before, test.outputs(model)), "after inject the output has other bits")

    row["step"] = "comparing with W + cBA"
    reference, exact = copy.deepcopy(plain).requires_grad_(False), dict[str, list[Tensor]]()
    for name, layer in layers.items():
        W, B = layer.base_weight.detach(), layer.lora_B.data.normal_()
        B *= UPDATE * _norm(W) / _norm(layer.scaling * (B @ layer.lora_A))
        exact[name] = [p.detach().to(before[0].dtype).requires_grad_() for p in (layer.lora_A, layer.lora_B)]
        product = layer.scaling * (exact[name][1] @ exact[name][0]).flatten(0, 1)
        # In this module alone, also where others share its weight.
        module = reference.get_submodule(name)
        del module._parameters[layer.weight_name]
        setattr(module, layer.weight_name, W + product)
    expected, found = (test.outputs(net, grad=True) for net in (reference, model))
    for outputs in (expected, found):
        _loss(outputs).backward()
    _require_close(row, "output", found, expected, tolerance)
    row["unreached"] = [name for name, (_, B) in exact.items() if not _norm(_gradient(B))]
    # Gradients far below the largest of their kind hold nothing but rounding.
    floors = [tolerance * max(_norm(_gradient(p)) for p in kind) for kind in zip(*exact.values(), strict=True)]
    half = math.sqrt(torch.finfo(torch.float32).eps)
    for name, layer in layers.items():
        for what, p, wanted, floor in zip("AB", (layer.lora_A, layer.lora_B), exact[name], floors, strict=True):
            _require_close(row, f"gradient of {what} of {name}", [_gradient(p)], [_gradient(wanted)], half, floor)

    row["step"] = "merging"
    unmerged = test.outputs(model)
    slora.merge(model)
    _require_close(row, "merged output", test.outputs(model), expected, tolerance)
    slora.unmerge(model)
    _require(row, _same(unmerged, test.outputs(model)), "unmerged it gives another output than before")

    row["step"] = "saving and loading"
    slora.save_adapter(model, folder)
    loaded = slora.load_adapter(copy.deepcopy(plain), folder)
    _require(row, _same(unmerged, test.outputs(loaded)), "loaded from a file it gives another output")

    row["step"] = "unloading"
    slora.unload(model)
    for p, original in zip(model.parameters(), plain.parameters(), strict=True):
        # PyTorch chooses by it how it multiplies.
        p.requires_grad_(original.requires_grad)
    _require(row, _same(before, test.outputs(model)), "unloaded it gives another output than the base model")
    _require(row, _same(plain.parameters(), model.parameters()), "unload leaves other weights")


def _prepared(test: ModelUnderTest) -> nn.Module:
    """The model in the widest dtype in which its output and its gradients are finite.

    Weights that are constant or NaN, such as LayerScale, which would hide a layer's output, become random. Batch norms
    take the statistics of the one batch that there is.
    """
    torch.manual_seed(1)
    for module in test.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    for p in test.model.parameters():
        if p.is_floating_point() and p.numel() > 1 and not p.min() < p.max():
            p.data.nan_to_num_(0.0).add_(torch.randn_like(p), alpha=0.1 if p.dim() == 1 else 0.02)
    # In fp64 PyTorch's recurrent layers add in another order where their weights are frozen.
    recurrent = any(isinstance(module, nn.RNNBase) for module in test.model.modules())
    for dtype in (torch.float64,) * (not recurrent) + (torch.float32,):
        trial = copy.deepcopy(test.model).to(dtype)
        try:
            test.outputs(trial.train())
            # Before the trial's own backward, because some models keep what they have computed.
            plain = copy.deepcopy(trial.eval())
            outputs = test.outputs(trial, grad=True)
            _loss(outputs).backward()
            if all(bool(t.isfinite().all()) for t in (*outputs, *map(_gradient, trial.parameters()))):
                return plain
        except RuntimeError:
            # Some models create fp32 tensors, or masks of the least fp32 number.
            if dtype == torch.float32:
                raise
    raise Skip("the base model's own output or gradient is not finite")


def _require(row: Row, holds: bool, otherwise: str) -> None:
    if not holds:
        row["mismatches"].append(otherwise)


def _require_close(
    row: Row, what: str, found: Iterable[Tensor], exact: Iterable[Tensor], tolerance: float, floor: float = 0.0
) -> None:
    """The largest norm of a difference over that of the exact value, or over `floor` where that is larger."""
    pairs = zip(found, exact, strict=True)
    errors = [_norm(a.double() - e.double()) / max(_norm(e), floor, 1e-300) for a, e in pairs]
    _require(row, all(error <= tolerance for error in errors), f"the {what} deviates by {max(errors):.1e}")


def _loss(outputs: Iterable[Tensor]) -> Tensor:
    """The mean square of the distance to random targets: that to 0 says nothing of outputs that are normalised."""
    torch.manual_seed(2)
    differences = [t - torch.randn(t.shape).to(t.dtype) for t in outputs if t.requires_grad]
    return torch.stack([d.square().mean() for d in differences]).sum()


def _gradient(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def _norm(tensor: Tensor) -> float:
    return float(tensor.detach().double().norm())


def _same(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
