"""Modules and parameters of a model by their names without the wrappers of other libraries."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from slora.errors import StateError

# The attribute in which each class keeps the wrapped module. By the names of classes, to import no package for them.
_WRAPPED = {
    "OptimizedModule": "_orig_mod",
    "ActivationWrapper": "_checkpoint_wrapped_module",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "DeepSpeedEngine": "module",
    "AveragedModel": "module",
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    # slora's own: a CLIP with the prompts of a data set, whose adapter is that of the CLIP.
    "PromptedClip": "clip",
}


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers around `module`, or `module` itself if there are none.

    Wrappers are those of torch.compile, DataParallel, DistributedDataParallel, activation checkpointing, averages of
    weights (`torch.optim.swa_utils`, timm), and `slora.clip.PromptedClip`.

    Raises:
        StateError: the parameters lie in pieces of flat tensors (FullyShardedDataParallel).
    """
    while (attribute := _attribute(type(module))) in module._modules:  # type: ignore[arg-type]
        if attribute == "_fsdp_wrapped_module":
            raise StateError(
                "FullyShardedDataParallel keeps parameters in pieces of flat tensors, in which slora finds no gates; "
                "use torch.distributed.fsdp.fully_shard, which keeps each parameter"
            )
        inner = module._modules[attribute]
        assert inner is not None
        module = inner
    return module


@functools.lru_cache(maxsize=1024)
def _attribute(kind: Any) -> str:
    return next((_WRAPPED[base.__name__] for base in kind.__mro__ if base.__name__ in _WRAPPED), "")


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Yield what `model.named_modules()` would if there were no wrappers.

    Raises:
        StateError: as `unwrapped`.
    """
    return _walk(unwrapped(model), set() if remove_duplicate else None)


def _walk(model: nn.Module, seen: set[nn.Module] | None) -> Iterator[tuple[str, nn.Module]]:
    # A stack, not a generator per module: each item would pass through all those above it.
    ahead = [("", model)]
    while ahead:
        name, module = ahead.pop()
        module = unwrapped(module)
        if seen is not None:
            if module in seen:
                continue
            seen.add(module)
        yield name, module
        if module._modules:
            prefix = f"{name}." if name else ""
            ahead += [(prefix + key, child) for key, child in reversed(module._modules.items()) if child is not None]


def named_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what `model.named_parameters()` would if there were no wrappers."""
    seen: set[nn.Parameter] = set()
    for prefix, module in named_modules(model, remove_duplicate):
        for key, parameter in module._parameters.items():
            if parameter is None or (remove_duplicate and parameter in seen):
                continue
            seen.add(parameter)
            yield f"{prefix}.{key}" if prefix else key, parameter


def module_at(model: nn.Module, name: str) -> nn.Module:
    """Return the module that `named_modules` gives the name `name`.

    Raises:
        AttributeError: there is none.
    """
    module = unwrapped(model)
    for key in name.split(".") if name else ():
        child = module._modules.get(key)
        if child is None:
            raise AttributeError(f"{type(module).__name__} has no module {key!r}")
        module = unwrapped(child)
    return module


def parameter_at(model: nn.Module, name: str) -> nn.Parameter:
    """Return the parameter that `named_parameters` gives the name `name`.

    Raises:
        AttributeError: there is none.
    """
    prefix, _, key = name.rpartition(".")
    found = module_at(model, prefix)._parameters.get(key)
    if found is None:
        raise AttributeError(f"{type(unwrapped(model)).__name__} has no parameter {name!r}")
    return found


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return what `model.state_dict()` would if there were no wrappers: tensors that share memory with the model's."""
    tensors: dict[str, Any] = {}
    for name, module in named_modules(model, remove_duplicate=False):
        module._save_to_state_dict(tensors, f"{name}." if name else "", keep_vars=False)
    return tensors
