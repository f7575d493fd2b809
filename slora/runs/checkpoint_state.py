"""`state.json` of a checkpoint, and a reader that checks every value. Nothing here imports torch.

`sha256sums.txt`, in the format of `sha256sum`, detects damaged files. It does not protect against forged ones, so
values are checked as well.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slora.errors import CheckpointError, DamagedCheckpointError
from slora.io.bounded import all_are, as_said, is_count, is_number, parse_json, read_bytes, read_text, require_file

STATE, TENSORS, DIGESTS = "state.json", "tensors.safetensors", "sha256sums.txt"
FORMAT = 3

# Bytes of `sha256sums.txt`.
LARGEST = 1 << 12

_NAME = re.compile(r"step-(\d+)", re.ASCII)


@dataclass(frozen=True)
class State:
    """The state of a run, except its tensors.

    Attributes:
        settings: `TrainSettings.to_dict`.
        model: `slora.training.fingerprint.fingerprint`.
        gates_moved: how often the gates have moved, by layer; it seeds the probes.
        freed: layers whose matrices were freed under inactive="frozen".
        stateless: parameters without optimizer state, because they had no gradient so far.
        random: `RandomStates.values`.
        step: optimizer steps taken, of `steps`.
        processes: number of processes of the run.
        selection: `Strategy.state_dict`, or None.
        result: the fields of `TrainResult`.
    """

    settings: dict[str, Any]
    model: dict[str, Any]
    gates_moved: dict[str, int]
    freed: list[str]
    stateless: list[str]
    random: dict[str, Any]
    step: int
    steps: int
    processes: int
    selection: dict[str, Any] | None
    result: dict[str, Any]


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint folder; -1 for other names."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def text_of(state: State) -> str:
    """Return the content of `state.json`."""
    return json.dumps({"format": FORMAT, **vars(state)}, allow_nan=False)


def digests_of(*paths: Path) -> str:
    """Return the content of `sha256sums.txt` for files of one folder."""
    return "".join(f"{_digest(path)}  {path.name}\n" for path in paths)


def check_digest(path: Path) -> None:
    """Check that a file of a checkpoint has the digest that was written with it.

    Raises:
        CheckpointError: it has another, is not a file, or its digest is missing.
    """
    try:
        require_file(path)
        lines = read_text(path.parent / DIGESTS, LARGEST).splitlines()
    except CheckpointError as error:
        raise DamagedCheckpointError(f"{error}; use another checkpoint") from error
    if f"{_digest(path)}  {path.name}" not in lines:
        raise DamagedCheckpointError(
            f"{path} is damaged: its SHA-256 is not the one in {DIGESTS}; use another checkpoint"
        )


def read_state(folder: Path) -> State:
    """Return the state of a checkpoint, with the type and range of every value checked.

    Raises:
        CheckpointError: the file is missing, damaged, or of another version of slora; names the value.
    """
    path = folder / STATE
    check_digest(path)
    try:
        content = parse_json(read_bytes(path).decode("utf-8"))
    except ValueError as error:
        raise DamagedCheckpointError(f"{path} is not readable JSON ({error}); use another checkpoint") from error
    number = content.get("format") if isinstance(content, dict) else None
    if type(number) is not int:
        raise DamagedCheckpointError(f"{path} is damaged: its format number is missing; use another checkpoint")
    if number != FORMAT:
        raise CheckpointError(
            f"{path} has format {number}, and this version of slora reads {FORMAT}; resume with the version that "
            f"wrote it, or start a new run"
        )
    for name, holds in _FIELDS.items():
        if name not in content or not holds(content[name]):
            found = "is missing" if name not in content else f"is {as_said(content[name])}"
            raise DamagedCheckpointError(f"{path} is damaged: {name!r} {found}; use another checkpoint")
    for name in content:
        if name not in _FIELDS and name != "format":
            raise DamagedCheckpointError(f"{path} is damaged: it holds {as_said(name)}; use another checkpoint")
    state = State(**{name: content[name] for name in _FIELDS})
    if contradiction := _contradiction(state, step_of(folder)):
        raise DamagedCheckpointError(f"{path} is damaged: {contradiction}; use another checkpoint")
    return state


def _contradiction(state: State, named: int) -> str:
    """The first contradiction between values of a state; empty if there is none."""
    step, result, selection = state.step, state.result, state.selection
    if named not in (-1, step):
        return f"'step' is {step} in a folder named after step {named}"
    if step > state.steps:
        return f"'step' is {step} of {state.steps}"
    asked = state.settings.get("max_steps")
    if asked is not None and asked != state.steps:
        return f"'steps' is {state.steps}, and max_steps is {as_said(asked)}"
    for name, value in (("taken", step), ("steps", state.steps)):
        if selection is not None and selection.get(name) != value:
            return f"{name!r} of 'selection' is {as_said(selection.get(name))} at step {step} of {state.steps}"
    if (result["best_step"] is None) != (result["best_accuracy"] is None) or (result["best_step"] or 0) > step:
        return f"'best_step' is {result['best_step']} at step {step}"
    noted = [at for at, _ in result["active_blocks"]]
    if any(at > step for at in noted) or noted != sorted(set(noted)):
        return f"'active_blocks' of 'result' has steps that are not increasing or beyond {step}"
    if any(len(blocks) != len(state.gates_moved) for _, blocks in result["active_blocks"]):
        return "'active_blocks' of 'result' has another number of layers"
    return ""


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _is_names(value: Any) -> bool:
    return all_are(lambda name: isinstance(name, str), value) and len(set(value)) == len(value)


def _is_model(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"class", "shapes", "trainable", "frozen"}
        and isinstance(value["class"], str)
        and isinstance(value["frozen"], str)
        and isinstance(value["shapes"], dict)
        and all(all_are(is_count, shape) for shape in value["shapes"].values())
        and _is_names(value["trainable"])
    )


def _is_noted(value: Any) -> bool:
    """Whether it is `[step, [numbers of the active blocks, for each layer]]`."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and is_count(value[0])
        and all_are(lambda blocks: all_are(is_count, blocks), value[1])
    )


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


_RESULT: dict[str, Callable[[Any], bool]] = {
    # Filled only at the end of a run.
    "history": lambda value: value == [],
    "accuracy": lambda value: value is None or _is_share(value),
    "best_accuracy": lambda value: value is None or _is_share(value),
    "best_step": lambda value: value is None or is_count(value),
    "steps": is_count,
    "seconds": lambda value: is_number(value) and value >= 0,
    "flops": lambda value: type(value) is int and is_number(value) and value >= 0,
    "active_blocks": lambda value: all_are(_is_noted, value),
}


def _is_result(value: Any) -> bool:
    return (
        isinstance(value, dict) and value.keys() == _RESULT.keys() and all(_RESULT[name](value[name]) for name in value)
    )


# In the order of `State`.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "settings": lambda value: isinstance(value, dict),
    "model": _is_model,
    "gates_moved": lambda value: isinstance(value, dict) and all(map(is_count, value.values())),
    "freed": _is_names,
    "stateless": _is_names,
    "random": lambda value: isinstance(value, dict) and value.keys() == {"python", "numpy"},
    "step": is_count,
    "steps": is_count,
    "processes": lambda value: is_count(value) and value > 0,
    "selection": lambda value: value is None or isinstance(value, dict),
    "result": _is_result,
}
