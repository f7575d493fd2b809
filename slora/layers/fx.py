"""Adapted layers under `torch.fx.symbolic_trace`: each is recorded as one call, as a layer of torch.nn is."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy

from slora.errors import StateError


def record_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Record a call of `module` in the graph that an argument belongs to, and return its `Proxy`.

    Raises:
        StateError: `module` is itself what is traced, whose forward torch.fx would have to go through.
    """
    tracer: Any = next(value for value in (*args, *kwargs.values()) if isinstance(value, Proxy)).tracer
    if module is tracer.root:
        raise StateError(
            f"torch.fx cannot record {type(module).__name__}, whose own forward reads the weights of adapted layers; "
            f"call slora.merge_and_unload(model) first, or record a module that holds it"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
