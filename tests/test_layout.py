"""Where things are: packages that import downwards only, and a top level that holds packages."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From below to above: a module imports from its own package and from what stands before it. The kernels stand inside
# `ops`: above what a call consists of, below the backend that launches them.
ORDER = (
    "errors io config reference module_tree ops.dropout ops.operands kernels ops gates layers selection models "
    "adapters merging retention clip evaluation sources runs training report demo reproduce cli"
).split()
# `slora` itself: what it imports at once. Its other names, it looks up when they are first asked for.
FACADE = {"config", "errors"}


def _modules() -> dict[str, Path]:
    """Return `{name below slora: file}`; "" is slora itself."""
    files = [*(ROOT / "slora").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    names = [path.relative_to(ROOT).with_suffix("").parts for path in files]
    parts = [name if name[0] == "kernels" else name[1:] for name in names]
    return {".".join(p).removesuffix("__init__").rstrip("."): path for p, path in zip(parts, files, strict=True)}


def _imports(tree: ast.AST, within_functions: bool) -> Iterator[str]:
    """Yield the modules below slora that `tree` imports, but for those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.stmt | ast.ExceptHandler):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not within_functions:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "slora":
            yield from (f"{node.module}.{alias.name}"[6:] for alias in node.names)
        if isinstance(node, ast.Import):
            yield from (alias.name[6:] for alias in node.names if alias.name.split(".")[0] == "slora")
        yield from _imports(node, within_functions)


def _graph(within_functions: bool) -> dict[str, set[str]]:
    modules = _modules()
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = set(_imports(ast.parse(path.read_text(encoding="utf-8")), within_functions))
        # A name that is no module is one of the module before it.
        found = {each if each in modules else each.rpartition(".")[0] for each in found}
        graph[name] = (found & modules.keys()) - {name}
    return graph


def _place(module: str) -> int:
    """How high `module` stands in `ORDER`; `slora` itself, of which others ask the version, below all."""
    names = [each for each in ORDER if f"{module}.".startswith(f"{each}.")]
    return ORDER.index(max(names, key=len)) if names else -1


def test_every_import_goes_to_the_own_package_or_to_one_below() -> None:
    up = [
        f"{module} imports {other}"
        for module, imported in _graph(within_functions=True).items()
        for other in imported
        if module not in ("", "__main__") and module.split(".")[0] != other.split(".")[0]
        if _place(other) >= _place(module)
    ]
    assert not up
    assert {name.split(".")[0] for name in _modules()} - {"", "__main__"} == {name.split(".")[0] for name in ORDER}


def _assigned(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Yield every attribute that `tree` assigns to or deletes, in tuples, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node


def test_private_attributes_of_others_are_assigned_by_layers_and_gates_alone() -> None:
    found = [
        f"{module}:{target.lineno} {ast.unparse(target)}"
        for module, path in _modules().items()
        if module.split(".")[0] not in ("layers", "gates")
        for target in _assigned(ast.parse(path.read_text(encoding="utf-8")))
        if any(name.startswith("_") and not name.endswith("__") for name in ast.unparse(target).split(".")[1:])
        if ast.unparse(target).split(".")[0] not in ("self", "cls")
    ]
    assert not found


def test_what_slora_imports_at_once_is_small() -> None:
    assert _graph(within_functions=False)[""] == FACADE


def test_no_modules_import_each_other() -> None:
    graph = _graph(within_functions=False)
    # A package's __init__ lists what its modules define; within the package nothing goes through it.
    for module, imported in graph.items():
        imported.discard(module.rpartition(".")[0])
    assert list(TopologicalSorter(graph).static_order())


def test_the_top_level_holds_packages_and_at_most_six_files() -> None:
    listed = subprocess.run(["git", "ls-files", "slora"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    files = [name for name in listed if name.count("/") == 1 and not (ROOT / name).is_symlink()]
    assert len(files) <= 6, files


def test_every_package_says_in_its_first_line_what_lives_there() -> None:
    for folder in (ROOT / "slora").iterdir():
        if (folder / "__init__.py").exists():
            doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
            assert (doc or "").partition("\n")[0].endswith("."), folder
