"""Names of modules and parameters: what an entry of a list matches, and near names if it matches nothing."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from slora.errors import TargetError


def ends_with(name: str, ending: str) -> bool:
    """Whether `ending` is `name`, or its last components."""
    return name == ending or name.endswith("." + ending)


def inside(name: str, parents: Sequence[str]) -> bool:
    """Whether `name` is one of `parents` or within one."""
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def no_match(field: str, entry: str, names: Sequence[str], what: str = "module") -> TargetError:
    """Return the error for an entry of `field` that matches none of `names`, each of them a `what`."""
    return TargetError(f"{field} entry {entry!r} matches no {what}; near names are {', '.join(near(entry, names))}")


def near(entry: str, names: Sequence[str]) -> list[str]:
    """Return up to five names or endings of names, quoted, that are like `entry`."""
    endings = dict.fromkeys([*names, *(".".join(n.split(".")[-k:]) for n in names for k in (1, 2))])
    found = difflib.get_close_matches(entry, endings, n=5, cutoff=0.4) or list(endings)[:5]
    return [repr(name) for name in found]
