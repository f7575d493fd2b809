"""Which modules can be adapted, and why others cannot."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize, prune

from slora.errors import StateError
from slora.layers import LoRABlocks, ProjectionAttention, SelectiveLoRAAttention, SelectiveLoRALinear
from slora.module_tree.wrappers import module_at, named_modules

_EARLIER = "adapt the model before layers are quantised or replaced"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Fit(NamedTuple):
    """The adapted class that fits a module, or why none does."""

    kind: type[LoRABlocks] | None
    reason: str = ""
    """Empty where the module is neither a linear layer nor attention with an `in_proj_weight`."""


def fit(module: nn.Module) -> Fit:
    """Return how `module` can be adapted."""
    if isinstance(module, nn.Linear):
        reason = _unfit(module, nn.Linear, "weight", "bias")
        shape = () if reason else tuple(module.weight.shape)
        if not reason and shape != (module.out_features, module.in_features):
            reason = f"its weight has shape {list(shape)}, packed or sharded"
        return Fit(None, reason) if reason else Fit(SelectiveLoRALinear)
    if _is_packed(module):
        return Fit(None, f"{_path(module)} keeps its weight quantised and packed; {_EARLIER}")
    weight = module._parameters.get("in_proj_weight")
    if weight is None or weight.dim() != 2 or weight.shape[0] != 3 * weight.shape[1]:
        return Fit(None)
    reason = _unfit(module, None, "in_proj_weight", "in_proj_bias")
    usual = isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
    return Fit(None, reason) if reason else Fit(SelectiveLoRAAttention if usual else ProjectionAttention)


def shared_weights(model: nn.Module, weight_names: Mapping[str, str]) -> dict[str, str]:
    """Return `{layer: parameter}` for those of the layers `{name: attribute}` whose weight is another module's, too."""
    holders: dict[Any, list[tuple[str, nn.Module]]] = {}
    for name, module in named_modules(model):
        for key, parameter in module._parameters.items():
            for mark in () if parameter is None else _marks(parameter):
                holders.setdefault(mark, []).append((f"{name}.{key}" if name else key, module))
    found = {}
    for name, attribute in weight_names.items():
        layer = module_at(model, name)
        weight = layer._parameters[attribute]
        assert weight is not None
        others = [other for mark in _marks(weight) for other, holder in holders[mark] if holder is not layer]
        if others:
            found[name] = others[0]
    return found


def _marks(parameter: Tensor) -> Iterator[Any]:
    yield id(parameter)
    # Tensors on meta, and subclasses that wrap other tensors, have no memory of their own.
    plain = type(parameter) in (Tensor, nn.Parameter) and parameter.layout == torch.strided
    if plain and parameter.device.type != "meta" and parameter.numel():
        yield parameter.device, parameter.data_ptr()


def _unfit(module: nn.Module, base: type[nn.Module] | None, weight_name: str, bias_name: str) -> str:
    """Why blocks cannot be added to `module`, whose class should have the forward of `base`; or ""."""
    if base is not None and type(module).forward is not base.forward:
        # Quantised, tensor-parallel, ...: it computes something else.
        return f"{_path(module)} has a forward of its own; {_EARLIER}"
    if reason := _replaced_forward(module):
        return reason
    for name in (weight_name, bias_name):
        if name in module._parameters:
            value = module._parameters[name]
            if value is not None and (reason := _odd(value)):
                return f"its {name} {reason}"
            if value is None and name == weight_name:
                return f"its {name} is None"
        elif hasattr(module, name) and getattr(module, name) is not None:
            return f"its {name} {computed(module, name)}"
    return ""


def computed(module: nn.Module, name: str) -> str:
    """How attribute `name` of `module`, which is not a parameter, is computed, and how to make it one again."""
    if parametrize.is_parametrized(module, name):
        return (
            f"is computed from others at each call; torch.nn.utils.parametrize.remove_parametrizations(module, "
            f"{name!r}) makes it a parameter again"
        )
    hooks = list(module._forward_pre_hooks.values())
    if any(isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name for hook in hooks):
        return f"is pruned at each call; torch.nn.utils.prune.remove(module, {name!r}) makes it a parameter again"
    for kind in ("weight_norm", "spectral_norm"):
        if any(type(hook).__module__ == f"torch.nn.utils.{kind}" for hook in hooks):
            return (
                f"is computed at each call; torch.nn.utils.remove_{kind}(module, {name!r}) makes it a parameter again"
            )
    return f"is no parameter; set module.{name} = torch.nn.Parameter(module.{name}, requires_grad=False)"


def refuse_parametrized(layers: Mapping[str, LoRABlocks]) -> None:
    """Raise `StateError` if removing the blocks of a layer would lose a parametrization of its base."""
    for name, layer in layers.items():
        for part in (layer.weight_name, layer.bias_name):
            if parametrize.is_parametrized(layer, part):
                raise StateError(f"{name!r} cannot be made plain: its {part} {computed(layer, part)}")


def refuse_replaced_forward(layers: Mapping[str, LoRABlocks]) -> None:
    """Raise `StateError` if a forward was set on a layer after `inject`: it would go on calling the adapted layer."""
    for name, layer in layers.items():
        forward = layer.__dict__.get("forward")
        if forward is None or _is_own(layer, forward) or "_hf_hook" in layer.__dict__:
            continue
        raise StateError(
            f"{name!r} cannot be made plain: its forward was replaced on the instance after inject, and would go past "
            f"the plain layer; restore it with `del module.forward`, and replace it afterwards"
        )


def _is_packed(module: nn.Module) -> bool:
    """Whether `module` is one of the linear layers that torch.ao.quantization puts in place."""
    kind = type(module)
    return kind.__module__.startswith("torch.ao.nn.") and "Linear" in kind.__name__ and hasattr(module, "in_features")


def _path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _odd(value: Tensor) -> str:
    """Why a parameter is not a plain strided tensor of a dtype that can be adapted; or ""."""
    if type(value) not in (Tensor, nn.Parameter) and not isinstance(value, FakeTensor):
        return f"is a {type(value).__name__}; inject before it is quantised or sharded"
    if value.dtype not in _DTYPES:
        return f"has dtype {value.dtype}; {_EARLIER}"
    return "" if value.layout == torch.strided else f"has layout {value.layout}"


def _replaced_forward(module: nn.Module) -> str:
    """Why a forward that was set on the instance cannot be kept; or ""."""
    hook = module.__dict__.get("_hf_hook")
    if any(getattr(part, "offload", False) for part in (hook, *getattr(hook, "hooks", ()))):
        return "accelerate offloads its weights; load the model without offloading"
    for name in ("_old_forward", "forward"):
        forward = module.__dict__.get(name)
        if forward is None or _is_own(module, forward):
            continue
        if name == "_old_forward" or hook is None or not str(_module_of(forward)).startswith("accelerate."):
            return (
                "its forward was replaced on the instance, by what may go past the blocks; restore it with "
                "`del module.forward`, and replace it after inject"
            )
    return ""


def _is_own(module: nn.Module, forward: Any) -> bool:
    """Whether `forward` is the bound method of the class of `module`."""
    return (
        isinstance(forward, types.MethodType)
        and forward.__self__ is module
        and forward.__func__ is type(module).forward
    )


def _module_of(forward: Any) -> str | None:
    function = getattr(forward, "func", forward)
    module: str | None = getattr(function, "__module__", None)
    return module
