"""What a compiled kernel depends on, as one number: where it is the same, what was compiled before still holds."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import sys

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from benchmarks.compiled import Variant


def digest(variant: Variant) -> str:
    """Of the code of all kernels, the case that is compiled, and Triton, with which ptxas comes.

    Needs kernels that are not the interpreter's.
    """
    case = {field.name: getattr(variant, field.name) for field in dataclasses.fields(variant) if field.name != "kernel"}
    parts = [triton.__version__, _code(), variant.kernel.fn.__name__]
    parts += [f"{name}={_in_order(value)}" for name, value in case.items()]
    return _hash("\n".join(parts))


def chosen(of: str, one_in: int) -> bool:
    """Whether a digest is among the one in `one_in` that are compiled again to see whether the record is right."""
    return int(of[:8], 16) % one_in == 0


def _in_order(value: object) -> str:
    if isinstance(value, dict):
        return repr(sorted(value.items()))
    return repr(sorted(value) if isinstance(value, frozenset) else value)


@functools.cache
def _code() -> str:
    """Of everything that Triton compiles, and the constants that it reads: not of comments, docstrings or places."""
    found = []
    for name in sorted(sys.modules):
        for symbol, value in sorted(vars(sys.modules[name]).items()) if name.startswith("slora.kernels.") else ():
            if isinstance(value, JITFunction) and value.__module__ == name:
                found.append(f"{name}.{symbol}: {_without_docstring(value.src)}")
            elif isinstance(value, tl.constexpr):
                found.append(f"{name}.{symbol} = {value.value!r}")
    return _hash("\n".join(found))


def _without_docstring(source: str) -> str:
    tree = ast.parse(source)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and ast.get_docstring(function) is not None:
            function.body = function.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
