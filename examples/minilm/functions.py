"""The new task: find a Python function by the first sentence of its docstring, in the source of installed libraries."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from slora.errors import MissingDependencyError

LIBRARIES = ("numpy", "scipy", "sklearn", "networkx", "sympy", "torch")
Split = Literal["training", "validation", "test"]
Function = ast.FunctionDef | ast.AsyncFunctionDef

# Of ten modules: six, one and three.
_SPLITS: tuple[Split, ...] = ("training",) * 6 + ("validation",) + ("test",) * 3

# At most so many functions of a module, so that no large one dominates.
_PER_MODULE = 6


class Pair(NamedTuple):
    """A query and the document that answers it: here a sentence, and a function's source without its docstring."""

    query: str
    document: str


def roots() -> dict[str, Path]:
    """Return the folders of the standard library and of `LIBRARIES`, by name; nothing is imported.

    Raises:
        MissingDependencyError: a library is not installed.
    """
    found = {"python": Path(sysconfig.get_path("stdlib"))}
    for name in LIBRARIES:
        spec = find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise MissingDependencyError(f"{name} is not installed; install it with: pip install 'slora[train]'")
        found[name] = Path(spec.submodule_search_locations[0])
    return found


def function_pairs(folders: Mapping[str, Path], counts: Mapping[Split, int]) -> dict[Split, list[Pair]]:
    """Return pairs of each split, at most as many as `counts` says.

    A module belongs to one split, by a hash of its name. No query and no document is in two splits, or twice in one:
    copied functions and phrases such as "Return the result." would be known from training, or have two answers.

    Args:
        folders: of libraries, by name.
    """
    pairs: dict[Split, list[Pair]] = {split: [] for split in counts}
    seen: set[str] = set()
    for module, path in sorted(modules(folders).items(), key=lambda item: _hash(item[0])):
        split = split_of(module)
        if split not in counts or len(pairs[split]) >= counts[split]:
            continue
        taken = 0
        for pair in functions_in(path):
            texts = {pair.query.lower(), pair.document}
            if taken < _PER_MODULE and len(pairs[split]) < counts[split] and not texts & seen:
                pairs[split].append(pair)
                taken += 1
            seen |= texts
    return pairs


def modules(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Return the modules in `folders` by their dotted names, without tests and private folders of other packages."""
    found = {}
    for library, folder in folders.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if not {"tests", "test", "testing", "site-packages", "dist-packages", "externals"} & set(parts):
                found[".".join((library, *parts))] = path
    return found


def split_of(module: str) -> Split:
    """Return the split of a module: a function of its name alone."""
    return _SPLITS[_hash(module) % len(_SPLITS)]


def functions_in(path: Path) -> Iterator[Pair]:
    """Yield the functions and methods in a file that have a docstring of at least four words and a body."""
    try:
        with warnings.catch_warnings():
            # Old escapes in strings of other libraries.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError, ValueError):
        return
    for node in _outermost(tree):
        query = summary(ast.get_docstring(node) or "")
        body = node.body[1:]
        if node.name.startswith("_") or len(query.split()) < 4 or not body or isinstance(body[0], ast.Raise | ast.Pass):
            continue
        yield Pair(query, _source(node))


def summary(docstring: str) -> str:
    """Return the first sentence of a docstring as one line, without markup."""
    paragraph = " ".join(docstring.strip().split("\n\n", 1)[0].split())
    sentence = re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0]
    return re.sub(r":\w+:|[`*]", "", sentence).strip()


def _outermost(tree: ast.Module) -> Iterator[Function]:
    """Yield functions and methods, but none within another."""
    open_nodes: list[ast.AST] = [tree]
    while open_nodes:
        for node in ast.iter_child_nodes(open_nodes.pop(0)):
            if isinstance(node, Function):
                yield node
            elif isinstance(node, ast.ClassDef | ast.If | ast.Try):
                open_nodes.append(node)


def _source(function: Function) -> str:
    """Source without docstrings, decorators, annotations and comments. Changes `function`."""
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, Function | ast.ClassDef):
            node.decorator_list = []
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, Function):
            node.returns = None
    return ast.unparse(function)


def _hash(text: str) -> int:
    # Not Python's own, which differs from process to process.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
