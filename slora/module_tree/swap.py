"""Replace modules by others, wherever a model refers to them."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn


def swap(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Replace `module` by `new[module]` wherever `model` refers to it.

    That is among the children of modules, and in their other attributes: lists and dicts of modules, methods bound to
    them (`forward` itself, where accelerate has set one on the instance), and partial functions of them.
    """
    # The wrapper of a module that is compiled by itself is bound to its forward: it needs a new one.
    new, modules = dict(new), list(model.modules())
    for module in modules:
        inner = module._modules.get("_orig_mod")
        if inner is not None and inner in new and hasattr(module, "dynamo_ctx"):
            new[module] = type(module)(new[inner], module.dynamo_ctx)
    parents = [module for module in modules if module not in new]
    for holder in [*parents, *new.values()]:
        for name, child in holder._modules.items():
            if child is not None and child in new:
                holder._modules[name] = new[child]
        rebind(holder, new)


def rebind(holder: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Let the attributes of `holder` itself, other than its children, refer to `new[module]` instead of `module`."""
    for name, value in list(holder.__dict__.items()):
        # Most are flags, and hooks that there are none of.
        if value is None or type(value) is bool or (type(value) in (dict, OrderedDict) and not value):
            continue
        if name not in ("_parameters", "_buffers", "_modules"):
            replaced = _rebound(value, new, 3)
            if replaced is not value:
                holder.__dict__[name] = replaced


def _rebound(value: Any, new: Mapping[nn.Module, nn.Module], depth: int) -> Any:
    """`value` for the new modules; the same object where nothing in it refers to the old ones."""
    if isinstance(value, nn.Module):
        return new.get(value, value)
    if isinstance(value, types.MethodType):
        owner = value.__self__
        return _method(value, new[owner]) if isinstance(owner, nn.Module) and owner in new else value
    if not depth:
        return value
    if type(value) is functools.partial:
        function = _rebound(value.func, new, depth - 1)
        args = _rebound(value.args, new, depth - 1)
        keywords, attributes = dict(value.keywords), dict(value.__dict__)
        changed = [_replace(entries, new, depth - 1) for entries in (keywords, attributes)]
        if function is value.func and args is value.args and not any(changed):
            return value
        partial = functools.partial(function, *args, **keywords)
        partial.__dict__.update(attributes)
        return partial
    if type(value) in (dict, OrderedDict):
        _replace(value, new, depth - 1)
    elif type(value) is list:
        for i, part in enumerate(value):
            replaced = _rebound(part, new, depth - 1)
            if replaced is not part:
                value[i] = replaced
    elif type(value) is tuple:
        parts = tuple(_rebound(part, new, depth - 1) for part in value)
        return value if all(a is b for a, b in zip(parts, value, strict=True)) else parts
    return value


def _replace(entries: dict[Any, Any], new: Mapping[nn.Module, nn.Module], depth: int) -> bool:
    changed = False
    for key, part in entries.items():
        replaced = _rebound(part, new, depth)
        if replaced is not part:
            entries[key] = replaced
            changed = True
    return changed


def _method(method: types.MethodType, owner: nn.Module) -> types.MethodType:
    """The method of that name of `owner`; a function that was bound by hand is bound again."""
    own = getattr(type(owner), method.__func__.__name__, None)
    of_class = any(method.__func__ in vars(kind).values() for kind in type(method.__self__).__mro__)
    return types.MethodType(own if of_class and isinstance(own, types.FunctionType) else method.__func__, owner)
