"""Which modules read the weights of layers inside them, by the bytecode of their forward and of what that calls."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from slora.layers.weight_reads import METADATA
from slora.module_tree.wrappers import named_modules

PRODUCTS = frozenset(("linear", "matmul", "einsum", "addmm", "mm", "bmm", "baddbmm"))
"""Calls by which a method that computes with a weight differs from one that initialises or reports it."""
GETTERS = frozenset(("T", "mT", "H", "mH", "data", "real"))


class Read(NamedTuple):
    """A weight that a forward reads, as in `self.<path>.weight`."""

    path: str
    exact: bool
    """Whether the path starts at the module itself; else it is the end of one."""
    attribute: str
    getter: bool
    """Whether an attribute of the weight is taken, such as `.T`, which torch.compile does not report."""


def readers(model: nn.Module, weights: Mapping[str, str]) -> dict[str, dict[str, Read]]:
    """Return `{module name: {layer name: read}}` for the modules that read `weights`, `{layer name: attribute}`.

    PyTorch's own modules are left out, and so are reads of a dtype, a device or a shape alone. If the code takes the
    weight of an object that cannot be told, the module counts as reading the weights of all layers inside it.
    """
    found: dict[str, dict[str, Read]] = {}
    for name, module in named_modules(model):
        inside = [layer for layer in weights if layer != name and layer.startswith(name + "." if name else "")]
        for read in reads_of(type(module)) if inside else ():
            for layer in inside:
                path = layer.removeprefix(name + ".") if name else layer
                hit = path == read.path if read.exact else f".{path}".endswith("." + read.path if read.path else "")
                if hit and read.attribute == weights[layer]:
                    mine = found.setdefault(name, {})
                    mine[layer] = max(read, mine.get(layer, read), key=lambda one: one.getter)
    return found


def reads_of(kind: type[nn.Module]) -> frozenset[Read]:
    """The weights that the forward of modules of class `kind` reads, itself or in what it calls.

    Other methods count as well if they compute products of a weight: they may be called from elsewhere.
    """
    return _scanned(kind)[0]  # type: ignore[arg-type]  # mypy: a class is hashable


def methods_of(kind: type[nn.Module]) -> frozenset[str]:
    """The names of the methods, other than forward, whose own code reads weights; they may be called by themselves."""
    return _scanned(kind)[1]  # type: ignore[arg-type]  # mypy: a class is hashable


@functools.cache
def _scanned(kind: type[nn.Module]) -> tuple[frozenset[Read], frozenset[str]]:
    found: set[Read] = set()
    seen: set[types.FunctionType] = set()
    waiting = list(_methods(kind, "forward"))
    for name in {name for base in kind.__mro__ for name in vars(base) if not name.startswith("__")}:
        for method in _methods(kind, name):
            names = {called for code in _codes(method.__code__) for called in code.co_names}
            if names & PRODUCTS and any(True for code in _codes(method.__code__) for _ in _reads_in(code)):
                waiting.append(method)
    own: set[str] = set()
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        # A decorator calls the function that it wraps.
        called = [getattr(function, "__wrapped__", None), *_cells(function)]
        for code in _codes(function.__code__):
            reads = list(_reads_in(code))
            found.update(reads)
            if reads and _runs_at_once(kind, function):
                own.add(function.__name__)
            for name in code.co_names:
                waiting += _methods(kind, name)
                called.append(function.__globals__.get(name))
        waiting += [other for other in called if isinstance(other, types.FunctionType) and not _of_torch(other)]
    return frozenset(found), frozenset(own - {"forward"})


def _runs_at_once(kind: type, function: types.FunctionType) -> bool:
    """Whether `function` is a method of `kind`, neither static nor a generator."""
    lazy = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
    return inspect.getattr_static(kind, function.__name__, None) is function and not function.__code__.co_flags & lazy


def _methods(kind: type, name: str) -> Iterator[types.FunctionType]:
    for base in kind.__mro__:
        method: Any = base.__dict__.get(name)
        method = getattr(method, "__func__", getattr(method, "fget", method))
        if isinstance(method, types.FunctionType) and not _of_torch(method):
            yield method


def _of_torch(thing: Any) -> bool:
    return bool(thing.__module__ == "torch" or str(thing.__module__).startswith(("torch.", "slora.")))


def _cells(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:
            # Not filled yet.
            continue


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _reads_in(code: types.CodeType) -> Iterator[Read]:
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("NOP", "EXTENDED_ARG", "CACHE")]
    for i, step in enumerate(steps):
        if not _takes_attribute(step) or step.argval not in ("weight", "in_proj_weight"):
            continue
        after = steps[i + 1] if i + 1 < len(steps) else step
        asked = after.argval if _takes_attribute(after) else None
        if asked in METADATA:
            continue
        path: list[str] = []
        k = i - 1
        while k >= 0 and _takes_attribute(steps[k]):
            path.insert(0, steps[k].argval)
            k -= 1
        from_self = k >= 0 and _takes_self(steps[k])
        if path or not from_self:
            yield Read(".".join(path), from_self, step.argval, asked in GETTERS)


def _takes_attribute(step: dis.Instruction) -> bool:
    return step.opname in ("LOAD_ATTR", "LOAD_METHOD")


def _takes_self(step: dis.Instruction) -> bool:
    # Newer versions of Python load two variables in one step.
    last = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
    return step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and last == "self"
