"""`reproduce`: fine-tunes and evaluates the runs of a protocol, each in its folder, and compares figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slora.errors import CheckpointError, ConfigError
from slora.io.atomic import write_json, write_text
from slora.io.bounded import read_json
from slora.reproduce.needs import Need, imagenet, missing
from slora.reproduce.protocols import IMAGENET, PROTOCOLS, Run, figures
from slora.runs import rundir
from slora.runs.checkpoint_folders import checkpoints
from slora.runs.settings import TrainSettings
from slora.sources.suite_names import check_suites

if TYPE_CHECKING:
    from rich.console import Console

RESULT, PAGE = "reproduction.json", "reproduction.md"

# Settings that may differ between the calls that finish a run: they change nothing that it computes, or a run fills
# them in.
_FREE = (
    "head_first", "num_workers", "download", "data_root", "device", "progress", "tensorboard", "log_every", "keep_last",
    "save_every", "eval_batch_size",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A protocol with the user's changes; None leaves what the protocol says.

    Attributes:
        changes: settings of all runs.
        runs: names of those to run.
        suites, zero_shot, retrieval, source, k: what to evaluate on.
    """

    protocol: str
    out: Path
    data_root: Path = Path("data")
    eval_root: Path | None = None
    download: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)
    runs: Sequence[str] | None = None
    suites: str | None = None
    zero_shot: Sequence[str] | None = None
    retrieval: Sequence[str] | None = None
    source: str | None = None
    k: Sequence[int] | None = None


class Reproduction:
    """A protocol as it is run on this machine.

    Raises:
        ConfigError: the protocol, a run, a setting or a name is unknown.
    """

    def __init__(self, request: Request) -> None:
        if request.protocol not in PROTOCOLS:
            raise ConfigError(f"protocol {request.protocol!r} is unknown; use {' or '.join(PROTOCOLS)}")
        self.request, self.protocol = request, PROTOCOLS[request.protocol]
        root = request.data_root
        self.imagenet = imagenet(root)
        self.eval_root = root if request.eval_root is None else request.eval_root
        self.runs = [run for run in self.protocol.runs if request.runs is None or run.name in request.runs]
        known = [run.name for run in self.protocol.runs if run.settings is not None]
        for name in request.runs or ():
            if name not in known:
                raise ConfigError(f"run {name!r} is not part of {request.protocol}; use some of {', '.join(known)}")
        listed = ",".join(self.protocol.suites) if request.suites is None else request.suites
        self.suites = check_suites(listed) if listed else {}
        self.zero_shot = self.protocol.zero_shot if request.zero_shot is None else tuple(request.zero_shot)
        own = [str(root / each) for each in self.protocol.retrieval]
        self.retrieval = own if request.retrieval is None else list(request.retrieval)
        self.source = self._named(self.protocol.source) if request.source is None else request.source
        self.k = self.protocol.k if request.k is None else tuple(request.k)
        # Checked now, before anything is trained.
        self.settings = {run.name: self._settings(run) for run in self.runs if run.settings is not None}

    def _named(self, data: str | None) -> str | None:
        return self.imagenet if data == IMAGENET else data

    def _settings(self, run: Run) -> TrainSettings:
        values = {**self.protocol.settings, **(run.settings or {}), **self.request.changes}
        values["data"] = self._named(values["data"])
        values |= {"data_root": str(self.request.data_root), "download": self.request.download}
        return TrainSettings.from_dict(values)

    def deviations(self) -> list[str]:
        """Return what the user changed, as text."""
        request = self.request
        changed = [f"{name}={value}" for name, value in request.changes.items()]
        for name in ("suites", "zero_shot", "retrieval", "source", "k"):
            value = getattr(request, name)
            if value is not None:
                changed.append(f"{name}={value if isinstance(value, str) else ','.join(map(str, value)) or 'none'}")
        return changed

    def missing(self) -> list[Need]:
        """Return what is not on this machine."""
        first = next(iter(self.settings.values()))
        return missing(
            first.model or "",
            first.pretrained,
            first.data or "",
            self.request.data_root,
            suites=self.suites,
            eval_root=self.eval_root,
            zero_shot=self.zero_shot,
            retrieval=[Path(each) for each in self.retrieval],
            source=self.source,
            download=self.request.download,
        )

    def plan(self) -> list[str]:
        """Return what will be run, known and chosen settings, and where results go, as lines."""
        protocol, out = self.protocol, self.request.out
        lines = [protocol.title, f"  published in {protocol.paper}"]
        lines += [f"  known: {text}" for text in protocol.known] + [f"  our choice: {text}" for text in protocol.chosen]
        if changed := self.deviations():
            lines.append(f"  changed, so that figures are not those of the protocol: {', '.join(changed)}")
        for run in self.runs:
            if run.settings is None:
                continue
            shown = {**self.protocol.settings, **run.settings, **self.request.changes}
            shown["data"] = self.settings[run.name].data
            lines.append(f"run {run.name} in {out / run.name} ({self._state(run)})")
            lines.append("  " + " ".join(f"{name}={value}" for name, value in shown.items()))
        evaluated = [*self.suites, *(f"zero-shot {name}" for name in self.zero_shot), *self.retrieval]
        evaluated += [] if self.source is None else [f"k-NN {self.source}"]
        lines.append(f"each evaluated on: {', '.join(evaluated)}")
        return lines

    def _state(self, run: Run) -> str:
        folder = self.request.out / run.name
        if (folder / rundir.RESULT).exists():
            return "trained" + (" and evaluated" if self._evaluated(folder) is not None else "")
        found = checkpoints(folder / rundir.CHECKPOINTS)
        return f"resumes from {found[-1].name}" if found else "to be trained"

    def run(self, console: Console | None = None) -> dict[str, Any]:
        """Fine-tune and evaluate every run that is not finished, write `reproduction.json` and return it.

        Raises:
            ConfigError: a folder holds a run with other settings.
            Interrupted: Ctrl-C; the same command goes on from there. For the others see
                `slora.training.finetune_run.finetune` and `slora.training.evaluate_run.evaluate`.
        """
        for run in self.runs:
            if run.settings is not None:
                self._refuse_other(run)
        found = {run.name: self._measured(run, console) for run in self.runs if run.settings is not None}
        result = {
            "protocol": self.request.protocol,
            "paper": self.protocol.paper,
            "changed": self.deviations(),
            "measures": dict(self.protocol.measures),
            "runs": {
                run.name: {"published": dict(run.published), "ours": found.get(run.name, {})} for run in self.runs
            },
            "difference": self._difference(found),
            "note": self.protocol.note,
        }
        write_json(self.request.out / RESULT, result)
        write_text(self.request.out / PAGE, "\n".join(as_markdown(result)) + "\n")
        return result

    def _difference(self, found: Mapping[str, Mapping[str, float]]) -> dict[str, Any] | None:
        """The published difference between runs and ours, of those that were run."""
        wanted = self.protocol.difference
        if wanted is None:
            return None
        own = found.get(wanted.run, {}).get(wanted.measure)
        values = {name: found[name].get(wanted.measure) for name in wanted.others if name in found}
        ours = {name: own - value for name, value in values.items() if own is not None and value is not None}
        return {"measure": wanted.measure, "run": wanted.run, "published": wanted.published, "ours": ours}

    def _refuse_other(self, run: Run) -> None:
        """Refuse a folder whose run has other settings than this one."""
        folder = self.request.out / run.name
        if not (folder / rundir.CONFIG).exists():
            return
        made, wanted = rundir.read_settings(folder).to_dict(), self.settings[run.name].to_dict()
        for name, value in wanted.items():
            if name not in _FREE and made[name] != value:
                raise ConfigError(
                    f"{folder} holds a run with {name}={made[name]!r}, but this one has {value!r}; finish that one "
                    f"with its settings, or choose another --out"
                )

    def _measured(self, run: Run, console: Console | None) -> dict[str, float]:
        from slora.training.evaluate_run import evaluate
        from slora.training.finetune_run import finetune

        folder = self.request.out / run.name
        if not (folder / rundir.RESULT).exists():
            settings = self.settings[run.name].to_dict()
            if checkpoints(folder / rundir.CHECKPOINTS):
                finetune({name: settings[name] for name in ("data_root", "download")}, resume=folder, console=console)
            else:
                finetune(settings, out=folder, console=console)
        result = self._evaluated(folder)
        if result is None:
            result = evaluate(
                folder,
                self.source,
                self.k,
                suites=self.suites,
                eval_root=self.eval_root,
                zero_shot=self.zero_shot,
                retrieval=self.retrieval,
                data_root=str(self.request.data_root),
                download=self.request.download,
            )
        return {name: value for name, value in figures(result).items() if name in self.protocol.measures}

    def _evaluated(self, folder: Path) -> dict[str, Any] | None:
        """The evaluation of a run on the same sets, if there is one."""
        try:
            content = read_json(folder / rundir.EVALUATION)
        except CheckpointError:
            return None
        same = isinstance(content, dict) and content.get("request") == self._asked()
        return content if same else None

    def _asked(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "k": list(self.k),
            "suites": list(self.suites),
            "zero_shot": list(self.zero_shot),
            "retrieval": list(self.retrieval),
            "shots": [],
        }


def as_markdown(result: Mapping[str, Any]) -> list[str]:
    """Return our figures beside the published ones as a Markdown table, with the notes under it."""
    names = list(result["measures"])
    heads = [f"{what}: {whose}" for what in result["measures"].values() for whose in ("ours", "published")]
    lines = [f"| run | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for run, values in result["runs"].items():
        cells = [_cell(values[whose].get(name)) for name in names for whose in ("ours", "published")]
        lines.append(f"| {run} | {' | '.join(cells)} |")
    lines += ["", f"Percent; changes in points. Published in {result['paper']}."]
    if (found := result["difference"]) is not None:
        ours = ", ".join(f"{value:+.2f} above {name}" for name, value in found["ours"].items()) or "not measured"
        what = result["measures"][found["measure"]]
        lines.append(f"{what}, of {found['run']}: {ours}; published {found['published']:+.2f}.")
    if result["note"]:
        lines.append(result["note"])
    if result["changed"]:
        lines.append(f"Not the protocol: {', '.join(result['changed'])}.")
    return lines


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
