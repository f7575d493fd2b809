"""Which layers of a model a config targets, and why others are left out or refused."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from slora.config import SelectiveLoRAConfig
from slora.errors import TargetError
from slora.layers import LoRABlocks
from slora.models.adaptable import fit, shared_weights
from slora.models.modules_to_save import Saved
from slora.module_tree.names import ends_with, inside, near, no_match
from slora.module_tree.wrappers import module_at, named_modules, parameter_at, unwrapped

HEAD_NAMES = ("head", "heads", "fc", "classifier", "lm_head", "score", "qa_outputs", "cls", "fc_norm_head")
Kinds = dict[str, type[LoRABlocks]]


class Candidates(NamedTuple):
    """`{module name: adapted class}` for all layers that can be adapted, and `{module name: reason}` for others."""

    kinds: Kinds
    reasons: dict[str, str]


def targets(model: nn.Module, config: SelectiveLoRAConfig) -> Kinds:
    """Return `{module name: adapted class}` for the layers that `config` targets, in the order of the model.

    Raises:
        TargetError: a pattern matches no layer that can be adapted, or one whose weight is another parameter, too.
    """
    return select_targets(model, config).kinds


def select_targets(model: nn.Module, config: SelectiveLoRAConfig, tied: bool = False) -> Candidates:
    """Return the targets, and why other linear layers that "all-linear" selects cannot be adapted.

    With `tied`, layers in `target_modules` may share their weight with another module.
    """
    kinds, reasons = candidates(model)
    if not kinds:
        raise _no_linear(model, reasons=reasons)
    excluded = _matching(config.exclude_modules, {**kinds, **reasons}, model, "exclude_modules")
    if config.target_modules == "all-linear":
        heads = head_names(model)
        names = {name for name in kinds if not inside(name, heads)}
        if not names:
            raise _no_linear(model, list(kinds))
        names -= excluded
        shared = shared_weights(model, {name: kind.weight_name for name, kind in kinds.items() if name in names})
        names -= shared.keys()
        reasons = {**reasons, **{name: f"its weight is also {other!r}" for name, other in shared.items()}}
        skipped = {name: reason for name, reason in reasons.items() if not inside(name, [*heads, *excluded])}
    else:
        names = _matching(config.target_modules, kinds, model, "target_modules", reasons) - excluded
        if not tied:
            _refuse_shared(model, {name: kind for name, kind in kinds.items() if name in names})
        skipped = {}
    refuse_uncalled(model, names)
    return Candidates({name: kind for name, kind in kinds.items() if name in names}, skipped)


def candidates(model: nn.Module) -> Candidates:
    """Return all layers that can be adapted, in the order of the model, and why other linear layers cannot."""
    fits = {name: fit(module) for name, module in named_modules(model) if name}
    kinds = {name: kind for name, (kind, _) in fits.items() if kind}
    reasons = {name: reason for name, (_, reason) in fits.items() if reason}
    for name in [name for name in kinds if is_out_proj(model, name) and name.rpartition(".")[0] not in kinds]:
        reasons[name] = "attention that cannot be adapted reads its weight past any blocks"
        del kinds[name]
    return Candidates(kinds, reasons)


def _refuse_shared(model: nn.Module, kinds: Mapping[str, type[LoRABlocks]]) -> None:
    """Refuse to adapt a layer whose weight is the parameter of another module, too."""
    shared = shared_weights(model, {name: kind.weight_name for name, kind in kinds.items()})
    for name, other in shared.items():
        raise TargetError(
            f"the weight of {name!r} is also {other!r}, which merging would change, too; give {name!r} a weight of its "
            f"own (an nn.Parameter of a clone), or list it in exclude_modules"
        )


def refuse_uncalled(model: nn.Module, chosen: Set[str]) -> None:
    """Refuse to adapt an output projection whose attention is not adapted and reads the weight."""
    for name in chosen:
        parent = name.rpartition(".")[0]
        if parent not in chosen and is_out_proj(model, name):
            raise TargetError(
                f"{name!r} belongs to an nn.MultiheadAttention, which reads its weight and never calls it; "
                f"adapt {parent!r} as well, or exclude {name!r}"
            )


def refuse_bases(model: nn.Module, found: Mapping[str, type[LoRABlocks]], saved: Saved) -> None:
    """Refuse to train in full what the blocks of an adapted layer are added to."""
    bases = {}
    for name, kind in found.items():
        module = module_at(model, name)
        for attribute in (kind.weight_name, kind.bias_name):
            bases[module._parameters.get(attribute)] = name
    for name in saved.parameters:
        layer = bases.get(parameter_at(model, name))
        if layer is not None:
            raise TargetError(
                f"modules_to_save names {name!r}, but {layer!r} is adapted and keeps its weight and bias; name "
                f"the layer itself to train it in full instead, or list it in exclude_modules"
            )


def is_out_proj(model: nn.Module, name: str) -> bool:
    """Whether `name` is the output projection of an `nn.MultiheadAttention`, which reads its weight without a call."""
    parent, _, last = name.rpartition(".")
    return last == "out_proj" and isinstance(module_at(model, parent), nn.MultiheadAttention)


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the output heads: what the model itself returns as such (timm, transformers), and the usual names."""
    heads = [name for name, _ in unwrapped(model).named_children() if name in HEAD_NAMES]
    names = {module: name for name, module in named_modules(model)}
    for module in names:
        for getter in ("get_classifier", "get_output_embeddings"):
            if callable(getattr(module, getter, None)):
                try:
                    head = getattr(module, getter)()
                except (AttributeError, NotImplementedError):
                    continue
                for part in head if isinstance(head, (tuple, list)) else (head,):
                    if isinstance(part, nn.Module) and unwrapped(part) in names:
                        heads.append(names[unwrapped(part)])
    return tuple(heads)


def _matching(
    patterns: str | Collection[str] | None,
    candidates: Mapping[str, Any],
    model: nn.Module,
    field: str,
    reasons: Mapping[str, str] = MappingProxyType({}),
) -> set[str]:
    if patterns is None:
        return set()
    entries = [patterns] if isinstance(patterns, str) else list(dict.fromkeys(patterns))
    chosen: set[str] = set()
    for entry in entries:
        whole = isinstance(patterns, str)
        matches = functools.partial(re.fullmatch, entry) if whole else functools.partial(ends_with, ending=entry)
        hits = {name for name in candidates if matches(name)}
        if not hits:
            others = [(name, type(m).__name__) for name, m in named_modules(model) if name and matches(name)]
            if others:
                name, kind = next((other for other in others if other[0] in reasons), others[0])
                why = reasons.get(name)
                raise TargetError(
                    f"{field} entry {entry!r} matches only modules that cannot be adapted, such as {name!r} ({kind})"
                    + (f": {why}" if why else "; linear layers and attention with in_proj_weight can be")
                )
            if whole:
                raise _no_whole_name(field, entry, list(candidates))
            raise no_match(field, entry, list(candidates))
        chosen |= hits
    return chosen


def _no_linear(
    model: nn.Module, heads: Sequence[str] = (), reasons: Mapping[str, str] = MappingProxyType({})
) -> TargetError:
    kind = type(unwrapped(model)).__name__
    for name, reason in reasons.items():
        return TargetError(f"{kind} has no linear layer that can be adapted; {name!r} cannot: {reason}")
    if fit(unwrapped(model)).kind is not None:
        return TargetError(
            f"the model is itself a {kind}, and cannot be replaced in place; wrap it first, as in "
            f"nn.Sequential(layer), or use slora.SelectiveLoRALinear.from_linear"
        )
    remedies = []
    if any(isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) for module in model.modules()):
        remedies.append(
            "build it with linear layers for its convolutions of size 1 where it can have them, as timm's ConvNeXt "
            "with conv_mlp=False"
        )
    kinds = candidates(model).kinds
    tied = shared_weights(model, {name: kinds[name].weight_name for name in heads})
    if heads and not tied:
        remedies.append(f"adapt the head itself with target_modules={list(heads)}")
    remedy = ", or ".join(remedies) or "convolutions, embeddings and norms are not adapted: choose another model"
    transposed = [(name, module) for name, module in named_modules(model) if type(module).__name__ == "Conv1D"]
    text = f"{kind} has no linear layer {'below its head ' if heads else ''}to adapt"
    if transposed:
        name, module = transposed[0]
        what = "layer is" if len(transposed) == 1 else "layers are"
        text += f" ({len(transposed)} {what} {type(module).__module__}.Conv1D, such as {name!r}: not supported yet)"
    return TargetError(f"{text}; {remedy}")


def _no_whole_name(field: str, expression: str, names: Sequence[str]) -> TargetError:
    text = f"{field}={expression!r} is a string, so a regular expression for whole names of modules, and matches none"
    endings = [entry.strip() for entry in expression.split(",")]
    if all(any(ends_with(name, ending) for name in names) for ending in endings):
        return TargetError(f"{text}; for the modules whose names end so, use a list: {field}={endings}")
    return TargetError(f"{text}; near names are {', '.join(near(expression, names))}")
