"""Weights that a forward reads past their layer, as in `F.linear(x, self.qkv.weight, bias)` of the parent.

Such a call never reaches the layer, so its blocks would be skipped. While the forward of a `Reader` runs, a mode
watches what it does with the weights of adapted layers: `F.linear` becomes `LoRABlocks.project`, with the bias of the
call; anything else gets `W + c * B @ A` of the active blocks, where forming that is exact enough to train.
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

QUESTIONS = frozenset((
    "dtype", "device", "shape", "ndim", "layout", "requires_grad", "grad", "grad_fn", "is_cuda", "is_cpu", "is_meta",
    "is_leaf", "is_quantized", "is_sparse", "itemsize", "nbytes", "names", "size", "dim", "numel", "nelement", "stride",
    "element_size", "is_floating_point", "is_complex", "is_contiguous", "data_ptr", "get_device", "__class__",
))  # fmt: skip
"""What may be asked of a tensor without reading its values."""


class Reading(TorchFunctionMode):
    """Inside, calls on the base weights of `layers`, by name, see the blocks; `reached` tells whether one was made."""

    def __init__(self, layers: Mapping[str, LoRABlocks]) -> None:
        self.layers = layers
        self.reached = False

    def __enter__(self) -> Any:
        # With a method of its own torch.compile takes the frame that enters this whole, or leaves it alone.
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = _arguments(*args, **kwargs)
            name = self._owner(weight)
            if name is not None and self._owner(x) is None:
                self.reached = True
                # What the layer itself does with its weight is no reading.
                with torch._C.DisableTorchFunction():
                    return self.layers[name].project(x, bias=bias)
        if _name(func) not in QUESTIONS and any(self._owner(value) is not None for value in _flat(args, kwargs)):
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
        # A reader inside a reader: the outer one's mode would add the update again.
        with torch._C.DisableTorchFunction():
            return effective_weight(self.layers[name], name, [other for other in self.layers if other != name])


def watched(
    call: Callable[..., Any], layers: Mapping[str, LoRABlocks], module: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """Return `call(module, *args, **kwargs)`, in which calls on the weights of `layers`, and of those that `module` is
    known to read, see the blocks; and whether one was made.

    A graph that ran in here would be watched, though its calls were when it was made: products of a weight would get
    the blocks twice. So where torch.compile does not take all of it into one graph, it makes none.
    """
    # All in this very frame: one that is called may be compiled by itself, and takes no mode from outside.
    compiler = None if torch.compiler.is_compiling() else (set_eval_frame(None),)
    try:
        with Reading({**layers, **layers_read_by(module)}) as mode:
            return call(module, *args, **kwargs), mode.reached
    finally:
        if compiler is not None:
            set_eval_frame(*compiler)


class ReadLinear(SelectiveLoRALinear):
    """A `SelectiveLoRALinear` whose weight another module reads as well: its own products are no reading."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `[..., out]` for `input [..., in]`."""
        if isinstance(input, Proxy):
            return record_call(self, input)  # type: ignore[no-any-return]
        with torch._C.DisableTorchFunction():
            return self.project(input)


class Reader(nn.Module):
    """Mixed into the class of a module whose forward reads the weights of adapted layers inside it (`watch`)."""

    _slora_reads: dict[str, str]
    _slora_unseen: str
    _slora_methods: ClassVar[frozenset[str]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (_base_of(self), type(self)._slora_methods), self.__getstate__()  # type: ignore[no-untyped-call]


def watch(module: nn.Module, names: Mapping[str, str], unseen: str = "", methods: frozenset[str] = frozenset()) -> None:
    """Let the forward of `module` see the blocks of the adapted layers `{path inside module: name}` that it reads.

    The module stays the same object; its class becomes one of the same name that derives from its own. `unseen` is a
    layer whose weight it reads in a way that torch.compile does not show: an attribute of it, such as `.T`. Its
    `methods` see the blocks, too, where they are called by themselves, as by a checkpoint that computes them again.
    """
    module._slora_reads, module._slora_unseen = dict(names), unseen  # type: ignore[assignment]
    if not isinstance(module, Reader | LoRABlocks):
        _become(module, _reader_class(type(module), methods))  # type: ignore[arg-type]  # mypy: a class is hashable


def unwatch(module: nn.Module) -> None:
    """Take back what `watch` did."""
    if isinstance(module, Reader):
        _become(module, _base_of(module))
    for name in ("_slora_reads", "_slora_unseen"):
        module.__dict__.pop(name, None)


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    before = type(module)
    module.__class__ = kind
    for name, value in module.__dict__.items():
        # Where accelerate has put a forward on the instance, it keeps the one of the class.
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
                # Its graph would be watched.
                raise TargetError(
                    f"{type(module).__name__!r} reads the weight of {name!r}, which it holds in a module that is "
                    f"compiled by itself; compile {type(module).__name__!r} as a whole, or list {name!r} in "
                    f"exclude_modules"
                )
        if not isinstance(layer, LoRABlocks):
            layer = unwrapped(layer)
        # Something else may stand there by now.
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
    A, B, gate = layer.lora_A, layer.lora_B, layer.gate
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
    """`weight` with the bits of its products where it is trainable, as the base model's is (`backends.eager.base`).

    With gradients, that of a layer without blocks would be computed for nothing; a graph or a transform takes none.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or _are_functorch_transforms_active() or _is_tracing():
        return weight
    return weight.detach().requires_grad_()


def _within_compiled() -> bool:
    """Whether torch.compile would compile what is called from here, where it could not compile the caller."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False)


def _base_of(module: nn.Module) -> type[nn.Module]:
    return type(module).__mro__[2]


@functools.cache
def _reader_class(base: type[nn.Module], methods: frozenset[str]) -> type[nn.Module]:
    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    calls = {name: _watched_method(base, name) for name in ("forward", *sorted(methods))}
    return type(base.__name__, (Reader, base), {**names, **calls, "_slora_methods": methods})


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
        return watched(method, {}, self, *args, **kwargs)[0]

    return call


def _rebuild(base: type[nn.Module], methods: frozenset[str] = frozenset()) -> nn.Module:
    reader = _reader_class(base, methods)  # type: ignore[arg-type]
    return reader.__new__(reader)


def _arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    """The arguments of `F.linear`, by position or name."""
    return input, weight, bias


def _flat(args: Any, kwargs: Any) -> Iterator[Any]:
    for value in (*args, *kwargs.values()):
        if type(value) in (list, tuple):
            yield from value
        else:
            yield value


def _name(func: Any) -> str:
    name: str = getattr(func, "__name__", "")
    # The getter of an attribute is bound to the attribute.
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
