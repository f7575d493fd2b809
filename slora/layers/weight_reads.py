"""Weights that a forward reads past their layer, as in `F.linear(x, self.qkv.weight, bias)` of the parent.

Such a call never reaches the layer, so its blocks would be skipped. While the forward of a `WeightReader` runs, a
`TorchFunctionMode` intercepts calls on the weights of adapted layers: `F.linear` becomes `LoRABlocks.project`, with the
bias of the call; any other call gets `W + c * B @ A` of the active blocks, where that is precise enough to train.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active, _is_tracing
from torch._C._dynamo.eval_frame import set_eval_frame
from torch.fx import Proxy
from torch.overrides import TorchFunctionMode

from slora.errors import TargetError
from slora.layers.base import LoRABlocks
from slora.layers.fx import record_call
from slora.layers.linear import SelectiveLoRALinear
from slora.module_tree.wrappers import unwrapped
from slora.reference import indicator

METADATA = frozenset((
    "dtype", "device", "shape", "ndim", "layout", "requires_grad", "grad", "grad_fn", "is_cuda", "is_cpu", "is_meta",
    "is_leaf", "is_quantized", "is_sparse", "itemsize", "nbytes", "names", "size", "dim", "numel", "nelement", "stride",
    "element_size", "is_floating_point", "is_complex", "is_contiguous", "data_ptr", "get_device", "__class__",
))  # fmt: skip
"""Attributes and methods of a tensor that do not read its values."""


class WeightReads(TorchFunctionMode):
    """Inside, calls on the base weights of `layers`, by name, see the blocks; `reached` says whether there was one."""

    def __init__(self, layers: Mapping[str, LoRABlocks]) -> None:
        self.layers = layers
        self.reached = False

    def __enter__(self) -> Any:
        # A method of its own, so that torch.compile compiles the frame that enters this as a whole or not at all.
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = _arguments(*args, **kwargs)
            name = self._owner(weight)
            if name is not None and self._owner(x) is None:
                self.reached = True
                # The layer's own use of its weight is not to be intercepted.
                with torch._C.DisableTorchFunction():
                    return self.layers[name].project(x, bias=bias)
        if _name(func) not in METADATA and any(self._owner(value) is not None for value in _values(args, kwargs)):
            self.reached = True
            args = [self._replaced(value) for value in args]
            kwargs = {key: self._replaced(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)

    def _owner(self, value: Any) -> str | None:
        if isinstance(value, Tensor):
            for name, layer in self.layers.items():
                if value is layer._parameters.get(layer.weight_name):
                    return name
        return None

    def _replaced(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)([self._replaced(part) for part in value])
        name = self._owner(value)
        if name is None:
            return value
        # Where one reader calls another, the mode of the outer one would add the update again.
        with torch._C.DisableTorchFunction():
            return effective_weight(self.layers[name], name, [other for other in self.layers if other != name])


def call_watched(
    call: Callable[..., Any], layers: Mapping[str, LoRABlocks], module: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """Return `(call(module, *args, **kwargs), reached)`: the result, and whether a call on a weight was intercepted.

    Intercepted are the weights of `layers` and of the layers that `module` is known to read. If torch.compile cannot
    compile all of it into one graph, it compiles nothing here: a compiled graph contains the intercepted calls
    already, and when it ran inside the mode the blocks would be added twice.
    """
    # All in this frame: a function called from here may be compiled by itself, without the mode around it.
    compiler = None if torch.compiler.is_compiling() else (set_eval_frame(None),)
    try:
        with WeightReads({**layers, **layers_read_by(module)}) as mode:
            return call(module, *args, **kwargs), mode.reached
    finally:
        if compiler is not None:
            set_eval_frame(*compiler)


class ReadLinear(SelectiveLoRALinear):
    """A `SelectiveLoRALinear` whose weight another module reads as well: its own products are not intercepted."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `[..., out]` for `input [..., in]`."""
        if isinstance(input, Proxy):
            return record_call(self, input)  # type: ignore[no-any-return]
        with torch._C.DisableTorchFunction():
            return self.project(input)


class WeightReader(nn.Module):
    """Mixin for a module whose forward reads the weights of adapted layers inside it (`watch`)."""

    _slora_reads: dict[str, str]
    _slora_unseen: str
    _slora_methods: ClassVar[frozenset[str]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (_base_of(self), type(self)._slora_methods), self.__getstate__()  # type: ignore[no-untyped-call]


def watch(module: nn.Module, names: Mapping[str, str], unseen: str = "", methods: frozenset[str] = frozenset()) -> None:
    """Let the forward of `module` see the blocks of the adapted layers `{path inside module: name}` that it reads.

    The module stays the same object; its class becomes a subclass of the same name. `unseen` is a layer whose weight it
    reads in a way that torch.compile does not trace: by an attribute of it, such as `.T`. Its `methods` see the blocks,
    too, where they are called outside the forward, as by activation checkpointing when it recomputes them.
    """
    module._slora_reads, module._slora_unseen = dict(names), unseen  # type: ignore[assignment]
    if not isinstance(module, WeightReader | LoRABlocks):
        _become(module, _reader_class(type(module), methods))  # type: ignore[arg-type]  # mypy: a class is hashable


def unwatch(module: nn.Module) -> None:
    """Undo `watch`."""
    if isinstance(module, WeightReader):
        _become(module, _base_of(module))
    for name in ("_slora_reads", "_slora_unseen"):
        module.__dict__.pop(name, None)


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    before = type(module)
    module.__class__ = kind
    for name, value in module.__dict__.items():
        # accelerate puts a `forward` on the instance, and keeps the class's own beside it as a bound method.
        if isinstance(value, types.MethodType) and value.__self__ is module:
            key = value.__func__.__name__
            if getattr(before, key, None) is value.__func__:
                module.__dict__[name] = types.MethodType(getattr(kind, key), module)


def layers_read_by(module: nn.Module) -> dict[str, LoRABlocks]:
    """Return `{name: layer}` for the adapted layers whose weight `module` was found to read."""
    found = {}
    for path, name in module.__dict__.get("_slora_reads", {}).items():
        layer: Any = module
        for key in path.split("."):
            layer = getattr(layer, key)
            if not torch.compiler.is_compiling() and (layer._compiled_call_impl or "dynamo_ctx" in layer.__dict__):
                # Its graph would run inside the mode.
                raise TargetError(
                    f"{type(module).__name__!r} reads the weight of {name!r}, which it holds in a module that is "
                    f"compiled by itself; compile {type(module).__name__!r} as a whole, or list {name!r} in "
                    f"exclude_modules"
                )
        if not isinstance(layer, LoRABlocks):
            layer = unwrapped(layer)
        # The layer may have been replaced since.
        if isinstance(layer, LoRABlocks):
            found[name] = layer
    return found


def effective_weight(layer: LoRABlocks, name: str, others: Sequence[str] = ()) -> Tensor:
    """Return `W + c * B @ A` of the active blocks `[N, K]`, in the dtype of `W`, differentiable in A, B and the gates.

    `others` are further layers that the same module reads, for the error.

    Raises:
        TargetError: the sum would be rounded to 16 bits while the blocks are trained, which loses small updates; or
            `lora_dropout` would have to act on an input that is not known.
    """
    weight = layer.base_weight
    if layer.merged or not layer.enabled or layer.released:
        return _as_trainable(weight)
    A, B, gate = layer.lora_A, layer.effective_B, layer.gate
    device = weight.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    if torch.is_grad_enabled() and dtype.itemsize < 4 and any(part.requires_grad for part in (A, B, gate)):
        raise TargetError(
            f"the weight of {name!r} is read past the layer, in {dtype}, which cannot hold a small update of it; "
            f"train in float32 without autocast, or list {name!r} in exclude_modules"
            + (f"; the same module also reads {', '.join(map(repr, others))}" if others else "")
        )
    if layer.training and layer.lora_dropout:
        raise TargetError(
            f"the weight of {name!r} is read past the layer, so that lora_dropout={layer.lora_dropout} has no input to "
            f"act on; set lora_dropout=0, or list {name!r} in exclude_modules"
        )
    on = (gate >= layer.threshold)[:, None, None]
    # Inactive blocks themselves get no gradient, their gates do.
    update = torch.where(on, B, B.detach()) @ torch.where(on, A, A.detach())
    active = indicator(gate, layer.threshold)[:, None, None]
    if layer.inactive == "frozen":
        active = torch.where(on, active, active.detach())
    wide = torch.promote_types(weight.dtype, torch.float32)
    return _as_trainable((weight.to(wide) + (layer.scaling * active * update).flatten(0, 1)).to(weight.dtype))


def _as_trainable(weight: Tensor) -> Tensor:
    """`weight` so that products round as with a trainable weight, like the base model's (`backends.eager.base`).

    Only without gradients, where `requires_grad` costs nothing, and outside graphs and transforms.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or _are_functorch_transforms_active() or _is_tracing():
        return weight
    return weight.detach().requires_grad_()


def _within_compiled() -> bool:
    """Whether torch.compile would compile functions that are called from here, though it did not compile the caller."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False)


def _base_of(module: nn.Module) -> type[nn.Module]:
    return type(module).__mro__[2]


@functools.cache
def _reader_class(base: type[nn.Module], methods: frozenset[str]) -> type[nn.Module]:
    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    calls = {name: _watched_method(base, name) for name in ("forward", *sorted(methods))}
    return type(base.__name__, (WeightReader, base), {**names, **calls, "_slora_methods": methods})


def _watched_method(base: type[nn.Module], name: str) -> Callable[..., Any]:
    method = getattr(base, name)

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if name == "forward" and any(isinstance(value, Proxy) for value in (*args, *kwargs.values())):
            return record_call(self, *args, **kwargs)
        if self._slora_unseen and (torch.compiler.is_compiling() or _within_compiled()):
            raise TargetError(
                f"torch.compile does not show what is done with an attribute of the weight of {self._slora_unseen!r}, "
                f"such as .T; write .t(), or list {self._slora_unseen!r} in exclude_modules"
            )
        return call_watched(method, {}, self, *args, **kwargs)[0]

    return call


def _rebuild(base: type[nn.Module], methods: frozenset[str] = frozenset()) -> nn.Module:
    reader = _reader_class(base, methods)  # type: ignore[arg-type]
    return reader.__new__(reader)


def _arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    """The arguments of `F.linear`, by position or name."""
    return input, weight, bias


def _values(args: Any, kwargs: Any) -> Iterator[Any]:
    for value in (*args, *kwargs.values()):
        if type(value) in (list, tuple):
            yield from value
        else:
            yield value


def _name(func: Any) -> str:
    name: str = getattr(func, "__name__", "")
    # The getter of an attribute is a method of the attribute's descriptor, which has the name.
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
