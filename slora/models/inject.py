"""`inject`: find the layers of a model that a config targets and adapt them in place."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import nn

from slora.config import SelectiveLoRAConfig, matches_pattern
from slora.errors import ConfigError, SkippedLayerWarning, StateError, TargetError
from slora.gates.cache import GateCache
from slora.layers import LoRABlocks, ProjectionAttention, SelectiveLoRAAttention, SelectiveLoRALinear, adapted_layers
from slora.layers.bytecode import Read, methods_of, readers
from slora.layers.weight_reads import ReadLinear, unwatch, watch
from slora.models.adaptable import refuse_parametrized, refuse_replaced_forward
from slora.models.exclusive import changing
from slora.models.full_precision import keep_in_fp32, restore_dtypes
from slora.models.fused_encoders import set_fused_encoders
from slora.models.injection_record import Injection, find_injection, injected_submodule, set_injection
from slora.models.modules_to_save import Saved, saved_parts
from slora.models.targets import candidates, is_out_proj, refuse_bases, refuse_uncalled, select_targets
from slora.module_tree import sharded
from slora.module_tree.names import inside, no_match
from slora.module_tree.swap import swap
from slora.module_tree.wrappers import module_at, named_parameters, unwrapped
from slora.selection.strategy import end_strategy

Model = TypeVar("Model", bound=nn.Module)


def inject(model: Model, config: SelectiveLoRAConfig | None = None) -> Model:
    """Adapt every layer of `model` that `config` targets, in place, and return `model`.

    The model or parts of it may be wrapped; names are those without the wrappers. DistributedDataParallel has to come
    after. All base parameters are frozen; trainable are the LoRA matrices, the gates and `config.modules_to_save`.
    Base parameters keep their names in `state_dict`. Nothing is changed when an error is raised. Modules that
    `modules_to_save` names in a model of 16 bits are cast to fp32, and compute in fp32.

    Until the first step (`B = 0`) the output is the base model's bit for bit, with one exception. In eval mode without
    gradients `nn.MultiheadAttention` and `nn.TransformerEncoder` run fused kernels, which add in another order, until
    they are adapted; a fused encoder also gives zeros at padded positions, where an adapted one gives numbers without
    meaning. On a GPU `batch_first` attention differs by rounding, too.

    Raises:
        TargetError: a pattern matches nothing, or a module that cannot be adapted; near names are listed.
        ConfigError: the rank or the number of blocks does not fit a layer, which is named; or `config` is of another
            library.
        StateError: the model is adapted already, by PEFT too, or wrapped by DistributedDataParallel.
    """
    with changing:
        config = SelectiveLoRAConfig() if config is None else config
        if not isinstance(config, SelectiveLoRAConfig):
            raise ConfigError(
                f"config is a {type(config).__module__}.{type(config).__qualname__}; use "
                f"slora.SelectiveLoRAConfig(r=..., target_modules=...)"
            )
        _require_plain(model)
        saved = saved_parts(model, config)
        kinds, skipped = select_targets(model, config)
        found = {name: kind for name, kind in kinds.items() if not inside(name, saved.modules)}
        if not found:
            raise TargetError(
                "exclude_modules and modules_to_save leave no layer to adapt; remove entries, or name more "
                "target_modules"
            )
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(config, field) or ():
                if not any(matches_pattern(pattern, name) for name in found):
                    raise no_match(field, pattern, list(found), "layer that is adapted")
        adapt(model, _checked(model, config, saved, found, dict.fromkeys(found, config)))
    skipped = {name: reason for name, reason in skipped.items() if not inside(name, saved.modules)}
    if skipped:
        names = "; ".join(f"{name!r}: {reason}" for name, reason in list(skipped.items())[:5])
        more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        warnings.warn(
            f'target_modules="all-linear" leaves out linear layers that cannot be adapted: {names}{more}. List '
            f"them in exclude_modules if that is meant",
            SkippedLayerWarning,
            stacklevel=2,
        )
    return model


class Plan(NamedTuple):
    """What `adapt` is to do, checked.

    Attributes:
        config: what `injection(model)` will say.
        saved: what is trained in full.
        layers: the layers to adapt, and the class that each becomes.
        configs: the config of each layer, by name.
        readers: the modules that read the weights of layers inside them: `{module name: {layer name: how}}`.
    """

    config: SelectiveLoRAConfig
    saved: Saved
    layers: dict[str, type[LoRABlocks]]
    configs: Mapping[str, SelectiveLoRAConfig]
    readers: dict[str, dict[str, Read]]


def plan_for(model: nn.Module, config: SelectiveLoRAConfig, configs: Mapping[str, SelectiveLoRAConfig]) -> Plan:
    """Return the plan that adapts the layers that `configs` names, each by its own config, ignoring `target_modules`.

    Raises:
        TargetError: a layer does not exist or cannot be adapted.
        ConfigError: the rank or the number of blocks does not fit a layer, which is named.
        StateError: the model is adapted already, or wrapped by DistributedDataParallel.
    """
    _require_plain(model)
    saved = saved_parts(model, config)
    kinds, reasons = candidates(model)
    for name in configs:
        if name not in kinds or inside(name, saved.modules):
            why = "is trained in full" if name in kinds else "is no layer that can be adapted"
            why = f"cannot be adapted ({reasons[name]})" if name in reasons else why
            raise TargetError(f"{name!r} {why} in this {type(unwrapped(model)).__name__}")
    found = {name: kind for name, kind in kinds.items() if name in configs}
    refuse_uncalled(model, set(found))
    return _checked(model, config, saved, found, configs)


def targets_by_name(model: nn.Module, config: SelectiveLoRAConfig) -> set[str]:
    """Return the names of the layers that `config` targets; none if a field is a regular expression.

    Raises:
        TargetError: an entry matches no layer that can be adapted.
    """
    patterns = [config.target_modules, config.exclude_modules]
    if any(isinstance(pattern, str) and pattern != "all-linear" for pattern in patterns):
        return set()
    saved = saved_parts(model, config)
    return {name for name in select_targets(model, config, tied=True).kinds if not inside(name, saved.modules)}


def adapt(model: Model, plan: Plan) -> Model:
    """Carry out `plan`, which was made for this model, in place, and return `model`."""
    gate_cache = GateCache()
    with unchanged_on_error(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        new = {}
        for name, kind in plan.layers.items():
            module = module_at(model, name)
            new[module] = _adapted(kind, module, plan.configs[name], name, gate_cache)
        for parameter in plan.saved.of(model):
            parameter.requires_grad_(True)
        original_dtypes = keep_in_fp32(model, plan.saved)
        gate_cache.trained_in_full = [
            weakref.ref(p) for name in plan.saved.modules for p in module_at(model, name).parameters()
        ]
    swap(model, new)
    for name, layers in plan.readers.items():
        paths = {layer.removeprefix(name + "."): layer for layer in layers}
        module = module_at(model, name)
        unseen = next((layer for layer, one in layers.items() if one.getter), "")
        watch(module, paths, unseen, methods_of(type(module)))
    set_fused_encoders(model)
    set_injection(model, Injection(plan.config, *plan.saved, original_dtypes, tuple(plan.layers)))
    return model


def _require_plain(model: nn.Module) -> None:
    adapted = [name for name, _ in adapted_layers(model)]
    if adapted:
        raise StateError(
            f"the model is adapted already ({len(adapted)} layers, the first {adapted[0]!r}"
            f"{f', by slora.inject of its {inner!r}' if (inner := injected_submodule(model)) else ''}); "
            f"call slora.unload(model) or slora.merge_and_unload(model) before another inject"
        )
    for name, module in model.named_modules():
        kind = type(module)
        # By its name, so that PEFT need not be installed.
        if kind.__module__.startswith("peft."):
            raise StateError(
                f"{f'{name!r} is a' if name else 'the model is a'} {kind.__module__}.{kind.__name__} of PEFT, whose "
                f"adapter would be taken for a part of the base model; call model = model.merge_and_unload(), or "
                f"model.unload(), first"
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


def _checked(
    model: nn.Module,
    config: SelectiveLoRAConfig,
    saved: Saved,
    found: dict[str, type[LoRABlocks]],
    configs: Mapping[str, SelectiveLoRAConfig],
) -> Plan:
    refuse_bases(model, found, saved)
    for name, kind in found.items():
        kind.choose_blocks(configs[name], module_at(model, name), name)
    reading = _readers(model, found)
    read = {layer for layers in reading.values() for layer in layers}
    return Plan(config, saved, {n: ReadLinear if n in read else kind for n, kind in found.items()}, configs, reading)


def _readers(model: nn.Module, found: Mapping[str, type[LoRABlocks]]) -> dict[str, dict[str, Read]]:
    """The modules that read the weights of layers inside them: `{module name: {layer name: how}}`."""
    result = readers(model, {layer: kind.weight_name for layer, kind in found.items()})
    for name, kind in found.items():
        # A subclass of nn.MultiheadAttention with its own forward may call that of PyTorch, which reads this weight.
        if kind is ProjectionAttention and f"{name}.out_proj" in found and is_out_proj(model, f"{name}.out_proj"):
            result.setdefault(name, {})[f"{name}.out_proj"] = Read("out_proj", True, "weight", False)
    for name, layers in result.items():
        for layer in layers:
            if found[layer] is not SelectiveLoRALinear:
                raise TargetError(
                    f"{name or type(model).__name__!r} reads {found[layer].weight_name} of {layer!r} itself, past the "
                    f"blocks; list {layer!r} in exclude_modules"
                )
    return result


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Restore the values, dtypes and `requires_grad` of the parameters of `model` if an exception is raised inside."""
    before = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, data, requires_grad in before:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
        raise


def unload(model: Model) -> Model:
    """Remove all blocks, in place, and return the base model, its parameters still frozen.

    For a wrapped model the module inside the wrapper is returned: what DDP or torch.compile know of it is out of date.

    Raises:
        StateError: the blocks are merged into the weights; unmerge first, or call `slora.merge_and_unload`. Or the
            model is itself an adapted layer, or a base weight was parametrized since.
    """
    with changing:
        refuse_layer(model)
        sharded.refuse(model, "save the adapter, and go on with a model that is not")
        layers = dict(adapted_layers(model))
        merged = [name for name, layer in layers.items() if layer.merged]
        if merged:
            raise StateError(
                f"{merged[0]!r} is merged; call slora.unmerge(model) first, or slora.merge_and_unload(model)"
            )
        refuse_parametrized(layers)
        refuse_replaced_forward(layers)
        return remove_blocks(model, layers.values())


def remove_blocks(model: Model, layers: Iterable[LoRABlocks]) -> Model:
    """Do what `unload` says with all the adapted layers of `model`, after its checks."""
    end_strategy(model)
    for module in model.modules():
        unwatch(module)
    swap(model, {layer: layer.plain() for layer in layers})
    set_fused_encoders(model)
    record = find_injection(model)
    if record is not None:
        set_injection(model, None)
        restore_dtypes(model, record.original_dtypes)
    plain: Any = unwrapped(model)
    return plain  # type: ignore[no-any-return]


def refuse_layer(model: nn.Module) -> None:
    """Raise `StateError` if `model` is itself an adapted layer, which nothing holds that could hold a plain one."""
    layer = unwrapped(model)
    if isinstance(layer, LoRABlocks):
        raise StateError(
            f"the model is itself an adapted layer ({type(layer).__name__}), and cannot be replaced in place; use what "
            f"its fuse() returns (merged) or its plain() (the base layer)"
        )


def _adapted(
    kind: type[LoRABlocks], module: nn.Module, config: SelectiveLoRAConfig, name: str, gate_cache: GateCache
) -> LoRABlocks:
    if isinstance(module, nn.Linear):
        linear = ReadLinear if kind is ReadLinear else SelectiveLoRALinear
        return linear.from_linear(module, config, name=name, gate_cache=gate_cache)
    if isinstance(module, nn.MultiheadAttention) and kind is SelectiveLoRAAttention:
        return SelectiveLoRAAttention.from_attention(module, config, name=name, gate_cache=gate_cache)
    return ProjectionAttention.from_attention(module, config, name=name, gate_cache=gate_cache)
