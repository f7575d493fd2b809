"""The MiniLM of `examples/minilm` as a task: functions to find by their docstrings, words of WordNet to keep."""

from __future__ import annotations

from typing import Any, cast

from benchmarks.results import BenchmarkError
from benchmarks.selection.task import Configuration, Record
from slora.errors import MissingDependencyError

MEASURES = ("target", "nll", "drift")


class Functions:
    """Python functions to find by the first sentence of their docstring, among those of modules that no run saw."""

    name = "functions"
    title = "Functions by their docstrings"
    family = "minilm"
    target = "recall@1 %"
    retention = {"words": "WordNet recall@1 lost"}  # noqa: RUF012 (the protocol's attribute)
    rates = (1e-3, 2.5e-3, 6e-3, 1.5e-2)
    probe = False
    retains = ("old",)

    def check(self) -> None:
        """Find out whether the model and WordNet are here.

        Raises:
            BenchmarkError: one is not; says how to get it.
        """
        from examples.minilm.encoder import model_folder
        from examples.minilm.words import wordnet_folder

        try:
            model_folder()
            wordnet_folder()
        except MissingDependencyError as error:
            raise BenchmarkError(f"task {self.name!r}: {error}") from error

    def run(self, configuration: Configuration, seed: int, validation: bool = False, quick: bool = False) -> Record:
        """Train and measure once."""
        from examples.minilm.training import minilm_run

        run = minilm_run(
            configuration.settings, seed, validation, quick, bool(configuration.retain), configuration.scales
        )
        counts = ("active", "blocks", "ranks", "kept", "flops", "seconds")
        scaled = [{"scale": each["scale"], **_measures(each)} for each in run["scaled"]]
        return cast(Record, {**_measures(run), **{name: run[name] for name in counts}, "scaled": scaled})


def task(name: str) -> Functions:
    """Return the task."""
    return Functions()


def _measures(run: dict[str, Any]) -> dict[str, Any]:
    return {**{name: run[name] for name in MEASURES}, "lost": {"words": run["lost"]}}
