"""Writing a checkpoint: a folder with `tensors.safetensors`, `state.json` and `sha256sums.txt`.

It holds what training changes: trainable parameters, buffers, the state of optimizers and of the strategy, random
generators, progress, and how often the gates have moved, which seeds the probes. Frozen weights are only identified, by
their `fingerprint`. The folder is written under a temporary name, flushed and renamed, so it is complete or does not
exist; older ones are removed after that. Nothing is pickled. `slora.runs.checkpoint_state` defines `state.json`,
`slora.runs.checkpoint_folders` says which checkpoint a run may resume from.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from slora.io.atomic import cannot_write, umask
from slora.layers import adapted_layers
from slora.module_tree.wrappers import named_parameters, state_of
from slora.runs.checkpoint_folders import checkpoints
from slora.runs.checkpoint_state import (
    DIGESTS,
    STATE,
    TENSORS,
    State,
    digests_of,
    text_of,
)
from slora.runs.settings import TrainSettings
from slora.training import random_states
from slora.training.optimizers import Optimizers


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizers: Optimizers,
    settings: TrainSettings,
    identity: dict[str, Any],
    progress: dict[str, Any],
) -> Path:
    """Write `folder/step-<step>` and return it; then remove older ones but the last `keep_last` and the best.

    Args:
        identity: `fingerprint(model)`, taken at the start of the run.
        progress: `step`, `steps`, `processes`, `selection` and `result` of the run so far; see `State`.

    Raises:
        WriteError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    target = folder / f"step-{progress['step']:08d}"
    if target.exists():
        return target
    names: dict[Tensor, str] = {parameter: name for name, parameter in named_parameters(model)}
    tensors = {f"model.{name}": p.detach() for p, name in names.items() if p.requires_grad}
    # Gates freed by inactive="frozen" are not trainable any more, but differ from their initial values.
    tensors |= {f"model.{name}.gate": layer.gate.detach() for name, layer in adapted_layers(model)}
    tensors |= {f"buffer.{name}": buffer for name, buffer in buffers_of(model).items()}
    tensors |= {f"optimizer.{key}": value for key, value in optimizers.state(names).items()}
    # A copy without them: the rest is JSON.
    selection = None if progress["selection"] is None else dict(progress["selection"])
    if selection is not None:
        tensors |= {f"selection.{name}": value for name, value in selection.pop("tensors", {}).items()}
    randomness = random_states.present()
    tensors |= {f"random.{key}": value for key, value in randomness.tensors().items()}
    state = State(
        settings=settings.to_dict(),
        model=identity,
        gates_moved={name: layer.gate_cache.step for name, layer in adapted_layers(model)},
        freed=[name for name, layer in adapted_layers(model) if layer.released],
        stateless=optimizers.stateless(names),
        random=randomness.values(),
        **{**progress, "selection": selection},
    )
    _write(target, {key: value.detach().cpu().contiguous() for key, value in tensors.items()}, state)
    _remove_old(folder, settings.keep_last, progress["result"]["best_step"])
    return target


def _write(target: Path, tensors: dict[str, Tensor], state: State) -> None:
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(".step-*.tmp-*"):
            _discard(left)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.tmp-"))
        save_file(tensors, temporary / TENSORS)
        (temporary / STATE).write_text(text_of(state), encoding="utf-8")
        (temporary / DIGESTS).write_text(digests_of(temporary / TENSORS, temporary / STATE), encoding="utf-8")
        for path in (temporary / TENSORS, temporary / STATE, temporary / DIGESTS, temporary):
            # safetensors and mkdtemp create them for the owner only.
            path.chmod((0o777 if path == temporary else 0o666) & ~umask())
            _flush(path)
        os.replace(temporary, target)
        temporary = None
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        older = checkpoints(target.parent)
        if older:
            then, note = ", then resume the run", f"The last good checkpoint is {older[-1]}."
        else:
            then, note = ", then start the run again", "No checkpoint was written before it."
        raise cannot_write(target, error, then, note) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_old(folder: Path, keep_last: int, best_step: int | None) -> None:
    for path in checkpoints(folder)[:-keep_last]:
        if best_step is None or path.name != f"step-{best_step:08d}":
            # Renamed first: a kill must not leave half a checkpoint under a valid name.
            gone = path.with_name(f".{path.name}.tmp-old")
            path.rename(gone)
            _discard(gone)


def _discard(path: Path) -> None:
    """Remove a folder, or a link to one; ignore what cannot be removed."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors in the state dict of `model` that are not parameters, by name."""
    parameters = {name for name, _ in named_parameters(model, remove_duplicate=False)}
    return {
        name: value for name, value in state_of(model).items() if name not in parameters and isinstance(value, Tensor)
    }
