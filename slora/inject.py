"""`inject`: find the layers of a model that a config targets and adapt them in place."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple, TypeVar

from torch import nn

from slora import sharded
from slora.config import SelectiveLoRAConfig, matches_pattern
from slora.errors import StateError, TargetError
from slora.gate import GateMirror
from slora.layers import LoRABlocks, ProjectionAttention, SelectiveLoRAAttention, SelectiveLoRALinear, adapted_layers
from slora.locks import changing
from slora.names import ends_with, inside, near, no_match
from slora.saved import Saved, saved_parts
from slora.wide import Kept, unwiden, widen
from slora.wrappers import module_at, named_modules, named_parameters, parameter_at, unwrapped

Model = TypeVar("Model", bound=nn.Module)

HEAD_NAMES = ("head", "heads", "fc", "classifier", "lm_head", "score", "qa_outputs", "cls", "fc_norm_head")


class Injection(NamedTuple):
    """What `inject` did to a model."""

    config: SelectiveLoRAConfig
    modules_to_save: tuple[str, ...]
    parameters_to_save: tuple[str, ...] = ()
    wide: Kept = ()

    @property
    def saved(self) -> Saved:
        """What is trained in full."""
        return Saved(self.modules_to_save, self.parameters_to_save)


def inject(model: Model, config: SelectiveLoRAConfig | None = None) -> Model:
    """Adapt every layer of `model` that `config` targets, in place, and return `model`.

    The model may be in a wrapper, and so may be parts of it; names are those without. DistributedDataParallel has to
    come after. All base parameters are frozen; trainable are the LoRA matrices, the gates and `config.modules_to_save`.
    The output is the base model's bit for bit until the first step (`B = 0`), and base parameters keep their
    names in `state_dict`. Nothing is changed when an error is raised. One case agrees only up to rounding: in
    eval mode without gradients `nn.MultiheadAttention` and `nn.TransformerEncoder` take fused kernels, which add
    in another order, until they are adapted; a fused encoder also gives zeros at padded positions, where an
    adapted one gives numbers that mean nothing. On a GPU the same holds for `batch_first` attention. Modules that
    `modules_to_save` names in a model of 16 bits are kept, and compute, in fp32 from then on.

    Raises:
        TargetError: a pattern matches nothing, or a module that cannot be adapted; near names are listed.
        ConfigError: the rank or the number of blocks does not fit a layer, which is named.
        StateError: the model is adapted already, or wrapped by DistributedDataParallel.
    """
    with changing:
        config = SelectiveLoRAConfig() if config is None else config
        _require_plain(model)
        saved = saved_parts(model, config)
        found = {name: kind for name, kind in targets(model, config).items() if not inside(name, saved.modules)}
        if not found:
            raise TargetError(
                "exclude_modules and modules_to_save leave no layer to adapt; remove entries, or name more "
                "target_modules"
            )
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(config, field) or ():
                if not any(matches_pattern(pattern, name) for name in found):
                    raise no_match(field, pattern, list(found), "layer that is adapted")
        return adapt(model, _checked(model, Plan(config, saved, found, dict.fromkeys(found, config))))


class Plan(NamedTuple):
    """What `adapt` is to do, checked.

    Attributes:
        config: what the model notes.
        saved: what is trained in full.
        found: the layers, and what they become.
        configs: their settings, by name.
    """

    config: SelectiveLoRAConfig
    saved: Saved
    found: dict[str, type[LoRABlocks]]
    configs: Mapping[str, SelectiveLoRAConfig]


def plan_listed(model: nn.Module, config: SelectiveLoRAConfig, configs: Mapping[str, SelectiveLoRAConfig]) -> Plan:
    """Return the plan that adapts the layers that `configs` names, each by its own; no pattern of `config` is run.

    Raises:
        TargetError: a layer does not exist or cannot be adapted.
        ConfigError: the rank or the number of blocks does not fit a layer, which is named.
        StateError: the model is adapted already, or wrapped by DistributedDataParallel.
    """
    _require_plain(model)
    saved = saved_parts(model, config)
    kinds = _candidates(model)
    for name in configs:
        if name not in kinds or inside(name, saved.modules):
            why = "is trained in full" if name in kinds else "is no layer that can be adapted"
            raise TargetError(f"{name!r} {why} in this {type(unwrapped(model)).__name__}")
    found = {name: kind for name, kind in kinds.items() if name in configs}
    _refuse_uncalled(model, set(found))
    return _checked(model, Plan(config, saved, found, configs))


def targets_by_name(model: nn.Module, config: SelectiveLoRAConfig) -> set[str]:
    """Return the names of the layers that `config` targets, without those that only a regular expression tells.

    Raises:
        TargetError: an entry matches no layer that can be adapted.
    """
    patterns = [config.target_modules, config.exclude_modules]
    if any(isinstance(pattern, str) and pattern != "all-linear" for pattern in patterns):
        return set()
    saved = saved_parts(model, config)
    return {name for name in targets(model, config) if not inside(name, saved.modules)}


def adapt(model: Model, plan: Plan) -> Model:
    """Do what `plan`, made for this very model, says, in place, and return `model`."""
    mirror = GateMirror()
    with unchanged_on_error(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        new = {}
        for name, kind in plan.found.items():
            module = module_at(model, name)
            new[module] = _adapted(kind, module, plan.configs[name], name, mirror)
        for parameter in plan.saved.of(model):
            parameter.requires_grad_(True)
        wide = widen(model, plan.saved)
    swap(model, new)
    _set_fused_encoders(model)
    unwrapped(model)._slora = Injection(plan.config, *plan.saved, wide)  # type: ignore[assignment]
    return model


def _require_plain(model: nn.Module) -> None:
    adapted = [name for name, _ in adapted_layers(model)]
    if adapted:
        raise StateError(
            f"the model is adapted already ({len(adapted)} layers, the first {adapted[0]!r}); "
            f"call slora.unload(model) or slora.merge_and_unload(model) before another inject"
        )
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise StateError(
            "DistributedDataParallel synchronises the gradients of the parameters that it found when it was made; call "
            "slora.inject or slora.load_adapter before the model is wrapped"
        )
    sharded.refuse(model, "call slora.inject or slora.load_adapter before fully_shard")
    lazy = [name for name, p in named_parameters(model) if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise TargetError(f"{lazy[0]!r} of a lazy module has no shape yet; run the model once, then inject")


def _checked(model: nn.Module, plan: Plan) -> Plan:
    _refuse_bases(model, plan.found, plan.saved)
    for name, kind in plan.found.items():
        kind.choose_blocks(plan.configs[name], module_at(model, name), name)
    return plan


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Give the parameters of `model` their values, dtypes and `requires_grad` back if an exception passes."""
    before = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, data, requires_grad in before:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
        raise


def unload(model: Model) -> Model:
    """Take all blocks out again, in place, and return the base model, its parameters still frozen.

    Of a wrapped model what is in the wrapper is returned: what DDP or torch.compile know of it is out of date.

    Raises:
        StateError: the blocks are merged into the weights; unmerge first, or call `slora.merge_and_unload`. Or the
            model is itself an adapted layer.
    """
    with changing:
        refuse_layer(model)
        sharded.refuse(model, "save the adapter, and go on with a model that is not")
        layers = [layer for _, layer in adapted_layers(model)]
        merged = [name for name, layer in adapted_layers(model) if layer.merged]
        if merged:
            raise StateError(
                f"{merged[0]!r} is merged; call slora.unmerge(model) first, or slora.merge_and_unload(model)"
            )
        swap(model, {layer: layer.plain() for layer in layers})
        _set_fused_encoders(model)
        plain: Any = unwrapped(model)
        record = plain.__dict__.pop("_slora", None)
        if isinstance(record, Injection):
            unwiden(model, record.wide)
        return plain  # type: ignore[no-any-return]


def refuse_layer(model: nn.Module) -> None:
    """Raise `StateError` where `model` is itself an adapted layer, for which no plain one can be put in place."""
    layer = unwrapped(model)
    if isinstance(layer, LoRABlocks):
        raise StateError(
            f"the model is itself an adapted layer ({type(layer).__name__}), and cannot be replaced in place; use what "
            f"its fuse() returns (merged) or its plain() (the base layer)"
        )


def injection(model: nn.Module) -> Injection:
    """Return what `inject` was called with on `model`.

    Raises:
        StateError: `model` was not passed to `inject` itself.
    """
    found = getattr(unwrapped(model), "_slora", None)
    if not isinstance(found, Injection):
        raise StateError(
            f"{type(unwrapped(model)).__name__} is not adapted; call slora.inject(model, config) on this very module "
            f"first"
        )
    return found


def targets(model: nn.Module, config: SelectiveLoRAConfig) -> dict[str, type[LoRABlocks]]:
    """Return `{module name: adapted class}` for the layers that `config` targets, in the order of the model.

    Raises:
        TargetError: a pattern matches no layer that can be adapted.
    """
    candidates = _candidates(model)
    if not candidates:
        raise _no_linear(model)
    excluded = _matching(config.exclude_modules, candidates, model, "exclude_modules")
    if config.target_modules == "all-linear":
        heads = head_names(model)
        chosen = {name for name in candidates if not inside(name, heads)}
        if not chosen:
            raise _no_linear(model, list(candidates))
    else:
        chosen = _matching(config.target_modules, candidates, model, "target_modules")
    chosen -= excluded
    _refuse_uncalled(model, chosen)
    return {name: kind for name, kind in candidates.items() if name in chosen}


def _candidates(model: nn.Module) -> dict[str, type[LoRABlocks]]:
    """`{module name: adapted class}` for all layers that can be adapted, in the order of the model."""
    kinds = {name: kind for name, module in named_modules(model) if name and (kind := _kind(module))}
    # Attention that cannot be adapted reads the weight of its output projection past any blocks.
    return {n: kind for n, kind in kinds.items() if not _is_out_proj(model, n) or n.rpartition(".")[0] in kinds}


def _refuse_uncalled(model: nn.Module, chosen: Set[str]) -> None:
    """Refuse to adapt an output projection whose attention is not adapted and reads the weight."""
    for name in chosen:
        parent = name.rpartition(".")[0]
        if parent not in chosen and _is_out_proj(model, name):
            raise TargetError(
                f"{name!r} belongs to an nn.MultiheadAttention, which reads its weight and never calls it; "
                f"adapt {parent!r} as well, or exclude {name!r}"
            )


def _refuse_bases(model: nn.Module, found: Mapping[str, type[LoRABlocks]], saved: Saved) -> None:
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


def swap(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put `new[module]` at every place in `model` where `module` stands."""
    # Compiled by itself, a module is bound to its wrapper's forward.
    new = dict(new)
    for module in list(model.modules()):
        inner = module._modules.get("_orig_mod")
        if inner is not None and inner in new and hasattr(module, "dynamo_ctx"):
            new[module] = type(module)(new[inner], module.dynamo_ctx)
    parents = [module for module in model.modules() if module not in new]
    for parent in [*parents, *new.values()]:
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]


def _kind(module: nn.Module) -> type[LoRABlocks] | None:
    """The adapted class that fits `module`, or None."""
    if isinstance(module, nn.Linear):
        # A subclass with a forward of its own (quantised, tensor-parallel, ...) computes something else.
        if type(module).forward is nn.Linear.forward and _is_matrix(module._parameters.get("weight")):
            return SelectiveLoRALinear
        return None
    weight = module._parameters.get("in_proj_weight")
    if weight is not None and _is_matrix(weight) and weight.shape[0] == 3 * weight.shape[1]:
        usual = isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
        return SelectiveLoRAAttention if usual else ProjectionAttention
    return None


def _is_matrix(weight: Any) -> bool:
    # None where the weight is computed at each call (parametrisations, weight norm): it cannot be shared.
    return weight is not None and bool(weight.dim() == 2 and weight.is_floating_point())


def _is_out_proj(model: nn.Module, name: str) -> bool:
    """Whether `name` is the output projection of an `nn.MultiheadAttention`, which reads its weight without a call."""
    parent, _, last = name.rpartition(".")
    return last == "out_proj" and isinstance(module_at(model, parent), nn.MultiheadAttention)


def _adapted(
    kind: type[LoRABlocks], module: nn.Module, config: SelectiveLoRAConfig, name: str, mirror: GateMirror
) -> LoRABlocks:
    if isinstance(module, nn.Linear):
        return SelectiveLoRALinear.from_linear(module, config, name=name, mirror=mirror)
    if isinstance(module, nn.MultiheadAttention) and kind is SelectiveLoRAAttention:
        return SelectiveLoRAAttention.from_attention(module, config, name=name, mirror=mirror)
    return ProjectionAttention.from_attention(module, config, name=name, mirror=mirror)


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the output heads: by the model's own word (timm, transformers), else by the usual names."""
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
    patterns: str | Collection[str] | None, candidates: Mapping[str, Any], model: nn.Module, field: str
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
                raise TargetError(
                    f"{field} entry {entry!r} matches only modules that cannot be adapted, such as "
                    f"{others[0][0]!r} ({others[0][1]}); linear layers and attention with in_proj_weight can be"
                )
            if whole:
                raise _no_whole_name(field, entry, list(candidates))
            raise no_match(field, entry, list(candidates))
        chosen |= hits
    return chosen


def _no_linear(model: nn.Module, heads: Sequence[str] = ()) -> TargetError:
    kind = type(unwrapped(model)).__name__
    if _kind(unwrapped(model)) is not None:
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
    if heads:
        remedies.append(f"adapt the head itself with target_modules={list(heads)}")
    remedy = ", or ".join(remedies) or "convolutions, embeddings and norms are not adapted: choose another model"
    return TargetError(f"{kind} has no linear layer {'below its head ' if heads else ''}to adapt; {remedy}")


def _no_whole_name(field: str, expression: str, names: Sequence[str]) -> TargetError:
    text = f"{field}={expression!r} is a string, so a regular expression for whole names of modules, and matches none"
    endings = [entry.strip() for entry in expression.split(",")]
    if all(any(ends_with(name, ending) for name in names) for ending in endings):
        return TargetError(f"{text}; for the modules whose names end so, use a list: {field}={endings}")
    return TargetError(f"{text}; near names are {', '.join(near(expression, names))}")


def _set_fused_encoders(model: nn.Module) -> None:
    """Keep PyTorch's fused encoder path off wherever it would read weights past the blocks, else restore it."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            _hold(module, "activation_relu_or_gelu", 0, any(True for _ in adapted_layers(module)))
        elif isinstance(module, nn.TransformerEncoder):
            _hold(module, "use_nested_tensor", False, any(True for _ in adapted_layers(module)))


def _hold(module: nn.Module, attribute: str, value: Any, on: bool) -> None:
    kept = "_slora_" + attribute
    if on and kept not in module.__dict__:
        setattr(module, kept, getattr(module, attribute))
        setattr(module, attribute, value)
    elif not on and kept in module.__dict__:
        setattr(module, attribute, module.__dict__.pop(kept))
