"""Reading mutants: a correct load, or an error of slora's own with everything as it was. Nothing else."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.mutations.generator import Seal, mutants, write
from tests.mutations.limits import TooLong, limited


class Kind(NamedTuple):
    """Valid files of one kind and what reads them.

    Attributes:
        files: of one valid folder.
        other: of another valid folder, with the same names.
        seal: see `mutants`.
        attempt: reads a folder and returns whether it could be loaded. Raises an AssertionError where a load gave
            something else than the files say, or where a refusal (an `SLoRAError`, which it catches) left anything
            changed; every other exception passes through it.
    """

    files: Mapping[str, bytes]
    other: Mapping[str, bytes]
    seal: Seal
    attempt: Callable[[Path], bool]


class Outcome(NamedTuple):
    """How often a mutant was loaded and refused, and what went wrong: `{number: description}`."""

    loaded: int
    refused: int
    wrong: dict[int, str]


def run(kind: Kind, folder: Path, numbers: range, seed: int = 0) -> Outcome:
    """Read the mutants with these numbers, each from `folder`, which is overwritten."""
    count: Counter[bool] = Counter()
    wrong: dict[int, str] = {}
    for mutant in mutants(kind.files, numbers, other=kind.other, seal=kind.seal, seed=seed):
        write(folder, mutant.files)
        try:
            with limited(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                count[kind.attempt(folder)] += 1
        except (Exception, TooLong) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            line = f"{Path(where.filename).name}:{where.lineno}"
            wrong[mutant.number] = f"{mutant.what} -> {type(error).__name__} at {line}: {str(error)[:200]}"
    return Outcome(count[True], count[False], wrong)
