"""What is checked of one architecture: the same bits, the right values, and that every change can be undone.

The right values are computed here by the plain model with `W + c B A` in place of every adapted weight. Rounding, which
the model amplifies, is far below the tolerance: half of all digits of fp32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import slora
from slora.errors import SLoRAError
from slora.layers import adapted_layers
from slora.models.targets import head_names

RANK = 2
# The norm of every update over that of its weight: large enough to show in the output, too small to upset the model.
UPDATE = 0.1
TOLERANCE = math.sqrt(torch.finfo(torch.float32).eps)
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
        with torch.set_grad_enabled(grad):
            found = tree_leaves(model(*self.inputs, **self.named_inputs))
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
    model, linear, size = test.model, linear_layers(test.model), parameter_count(test.model)
    row["model"] = test.name
    if not linear:
        raise NothingToAdapt("no linear layer below the head")

    row["step"] = "the base model alone"
    _randomize_constants(model)
    # Batch norms take the statistics of the one batch that there is.
    test.outputs(model.train())
    plain, before = copy.deepcopy(model.eval()), test.outputs(model)
    if not all(bool(t.isfinite().all()) for t in before) or not _same(before, test.outputs(model)):
        raise Skip("the base model's own output is not finite, or differs from call to call")

    row["step"] = "inject"
    thin = {name: 1 for name, m in linear.items() if isinstance(m, nn.Linear) and min(m.weight.shape) < RANK}
    slora.inject(model, slora.SelectiveLoRAConfig(r=RANK, lora_alpha=8, rank_pattern=thin or None))
    layers = dict(adapted_layers(model))
    share = sum(layer.base_weight.numel() for layer in layers.values()) / size
    row |= {"adapted": len(layers), "share": round(share, 4)}
    _require(row, _same(before, test.outputs(model)), "after inject the output has other bits")

    row["step"] = "comparing with W + cBA"
    reference, exact = copy.deepcopy(plain).requires_grad_(False), dict[str, list[Tensor]]()
    for name, layer in layers.items():
        W, B = layer.base_weight.detach(), layer.lora_B.data.normal_()
        B *= UPDATE * _norm(W) / _norm(layer.scaling * (B @ layer.lora_A))
        exact[name] = [p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B)]
        product = layer.scaling * (exact[name][1] @ exact[name][0]).flatten(0, 1)
        # In this module alone, also where others share its weight.
        module = reference.get_submodule(name)
        del module._parameters[layer.weight_name]
        setattr(module, layer.weight_name, W + product)
    expected, found = (test.outputs(net, grad=True) for net in (reference, model))
    for outputs in (expected, found):
        _loss(outputs).backward()
    _require_close(row, "output", found, expected)
    row["unreached"] = [name for name, (_, B) in exact.items() if not _norm(_gradient(B))]
    # Gradients far below the largest of their kind hold nothing but rounding.
    floors = [TOLERANCE * max(_norm(_gradient(p)) for p in kind) for kind in zip(*exact.values(), strict=True)]
    for name, layer in layers.items():
        for what, p, wanted, floor in zip("AB", (layer.lora_A, layer.lora_B), exact[name], floors, strict=True):
            _require_close(row, f"gradient of {what} of {name}", [_gradient(p)], [_gradient(wanted)], floor)

    row["step"] = "merging"
    unmerged = test.outputs(model)
    slora.merge(model)
    _require_close(row, "merged output", test.outputs(model), expected)
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


def _randomize_constants(model: nn.Module) -> None:
    """Give random values to weights that are constant or NaN, such as LayerScale, which would hide a layer's output."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    for p in model.parameters():
        if p.is_floating_point() and p.numel() > 1 and not p.min() < p.max():
            p.data.nan_to_num_(0.0).add_(torch.randn_like(p), alpha=0.1 if p.dim() == 1 else 0.02)


def _require(row: Row, holds: bool, otherwise: str) -> None:
    if not holds:
        row["mismatches"].append(otherwise)


def _require_close(row: Row, what: str, found: Iterable[Tensor], exact: Iterable[Tensor], floor: float = 0.0) -> None:
    """The norm of each difference, over that of the exact value, or over `floor` where that is larger."""
    errors = [_norm(a - e) / max(_norm(e), floor, 1e-300) for a, e in zip(found, exact, strict=True)]
    _require(row, all(error <= TOLERANCE for error in errors), f"the {what} deviates by {max(errors):.1e}")


def _loss(outputs: Iterable[Tensor]) -> Tensor:
    """The mean square of the distance to random targets: that to 0 says nothing of outputs that are normalised."""
    torch.manual_seed(2)
    differences = [t - torch.randn(t.shape) for t in outputs if t.requires_grad]
    return torch.stack([d.square().mean() for d in differences]).sum()


def _gradient(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def _norm(tensor: Tensor) -> float:
    return float(tensor.detach().double().norm())


def _same(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
