"""Checkpoints: a folder with `tensors.safetensors`, `state.json` and `sha256sums.txt`, either complete or not there.

Kept is what training changes: trainable parameters, buffers, optimizer state, the random generators, where the run
stands, and how often the gates have moved (the seed of the probes). Frozen weights are only identified. The folder
is written under a temporary name, flushed and renamed; older ones go after that. Nothing is pickled. Which folders
there are, and which of them a run may go on from, is said in `checkpoint_folders.py`; what a state holds in
`checkpoint_state.py`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slora.errors import CheckpointError, DamagedCheckpointError
from slora.gates.release import release_frozen
from slora.io.atomic import cannot_write, umask
from slora.io.bounded import require_file
from slora.layers import adapted_layers
from slora.module_tree.wrappers import named_parameters, state_of, unwrapped
from slora.runs.checkpoint_folders import FIXED, before, check_settings, checkpoints, chosen, newest, refuse_newer
from slora.runs.checkpoint_state import (
    DIGESTS,
    STATE,
    TENSORS,
    State,
    check_digest,
    digests_of,
    read_state,
    step_of,
    text_of,
)
from slora.runs.settings import TrainSettings
from slora.training import random_states
from slora.training.optimizers import Optimizers

__all__ = [
    "FIXED",
    "Checkpoint",
    "before",
    "check_settings",
    "check_values",
    "checkpoints",
    "chosen",
    "fingerprint",
    "newest",
    "read_tensors",
    "refuse_newer",
    "save",
    "step_of",
]


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return what identifies a model that is about to be trained.

    Class, shapes of all parameters, names of the trainable ones, and a digest of up to 256 elements of each
    frozen one.
    """
    digest = hashlib.sha256()
    samples = []
    own = {layer.gate for _, layer in adapted_layers(model)}
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter not in own:
            flat = parameter.detach().reshape(-1)
            samples.append(flat[:: max(1, flat.numel() // 256)][:256].float())
    if samples:
        digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return {
        "class": type(unwrapped(model)).__name__,
        "shapes": {name: list(parameter.shape) for name, parameter in named_parameters(model)},
        # Strategies take the gates in and out of training.
        "trainable": [name for name, p in named_parameters(model) if p.requires_grad and p not in own],
        "frozen": digest.hexdigest(),
    }


def save(
    folder: Path,
    model: nn.Module,
    optimizers: Optimizers,
    settings: TrainSettings,
    identity: dict[str, Any],
    progress: dict[str, Any],
) -> Path:
    """Write `folder/step-<step>` and return it; then remove all older ones but the last and the best.

    Args:
        identity: `fingerprint(model)` from the start of the run.
        progress: `step`, `steps`, `selection` and `result` of the run so far; see `State`.

    Raises:
        WriteError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    target = folder / f"step-{progress['step']:08d}"
    if target.exists():
        return target
    names: dict[Tensor, str] = {parameter: name for name, parameter in named_parameters(model)}
    tensors = {f"model.{name}": p.detach() for p, name in names.items() if p.requires_grad}
    # Gates that were freed by the policy "frozen" are not trainable any more, but they differ from the start.
    tensors |= {f"model.{name}.gate": layer.gate.detach() for name, layer in adapted_layers(model)}
    tensors |= {f"buffer.{name}": buffer for name, buffer in _buffers(model).items()}
    tensors |= {f"optimizer.{key}": value for key, value in optimizers.state(names).items()}
    randomness = random_states.present()
    tensors |= {f"random.{key}": value for key, value in randomness.tensors().items()}
    state = State(
        settings=settings.to_dict(),
        model=identity,
        gates_moved={name: layer.gate_cache.step for name, layer in adapted_layers(model)},
        freed=[name for name, layer in adapted_layers(model) if layer.released],
        stateless=optimizers.stateless(names),
        random=randomness.values(),
        **progress,
    )
    _write(target, {key: value.detach().cpu().contiguous() for key, value in tensors.items()}, state)
    _remove_old(folder, settings.keep_last, progress["result"]["best_step"])
    return target


class Checkpoint:
    """A checkpoint that was read for a freshly prepared model: all of it is checked, and nothing has changed yet.

    Args:
        folder: of the checkpoint.
        identity: `fingerprint(model)`.
        optimizers: those of the run that goes on; None where only the model is wanted.

    Attributes:
        state: all but the tensors.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or of another model or run; names what differs.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        settings: TrainSettings,
        identity: dict[str, Any],
        optimizers: Optimizers | None = None,
    ) -> None:
        self.state = state = read_state(folder)
        _check_model(folder, state.model, identity)
        check_settings(folder, settings, state)
        self._model, self._optimizers = model, optimizers
        self._layers = dict(adapted_layers(model))
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in named_parameters(model)}
        parts = _by_kind(folder / TENSORS)
        self._values, self._kept = parts["model"], parts["optimizer"]
        try:
            self._random = random_states.parsed(state.random, parts["random"])
            freed = {f"{name}.{part}" for name in state.freed for part in ("lora_A", "lora_B", "gate")}
            self._expected = {n: p for n, p in named_parameters(model) if p.requires_grad and n not in freed}
            gates = {f"{name}.gate": layer.gate for name, layer in self._layers.items()}
            check_values("model", self._values, self._expected | gates)
            self._check_blocks()
            self._buffers, self._saved_buffers = _buffers(model), parts["buffer"]
            check_values("buffer", self._saved_buffers, self._buffers)
            if optimizers is not None:
                optimizers.check_state(self._names, self._kept, {*freed, *state.stateless}, state.step)
        except (ValueError, KeyError, TypeError) as error:
            said = f"{error} is missing" if isinstance(error, KeyError) else error
            raise DamagedCheckpointError(f"{folder} is damaged: {said}; use another checkpoint") from error

    def _check_blocks(self) -> None:
        """Check what the state says of blocks by their layers and gates."""
        layers, state = self._layers, self.state
        if state.gates_moved.keys() != layers.keys() or len(set(state.gates_moved.values())) > 1:
            raise ValueError("'gates_moved' is not of these layers, whose gates move together")
        for name in state.freed:
            if name not in layers or layers[name].inactive != "frozen":
                raise ValueError(f"{name[:60]!r} is not a layer that inactive='frozen' can have freed")
            if bool((self._values[f"{name}.gate"] >= layers[name].threshold).any()):
                raise ValueError(f"{name!r} was freed, but one of its blocks is active")
        for _, blocks in state.result["active_blocks"]:
            for name, numbers in zip(layers, blocks, strict=True):
                if any(number >= layers[name].blocks for number in numbers):
                    raise ValueError(f"'active_blocks' have {max(numbers)} of {name!r}, which has fewer blocks")

    @torch.no_grad()
    def put(self) -> None:
        """Put it all into the model and, where there are optimizers, into them and the random generators."""
        for name, layer in self._layers.items():
            layer.gate.copy_(self._values[f"{name}.gate"])
        if self.state.freed:
            (release_frozen if self._optimizers is None else self._optimizers.release)(self._model)
        # Blocks that went off at the very last step are freed here already, a step early.
        gone = {p for layer in self._layers.values() if layer.released for p in (layer.lora_A, layer.lora_B)}
        for name, value in self._expected.items():
            if value not in gone:
                value.copy_(self._values[name])
        for name, buffer in self._buffers.items():
            buffer.copy_(self._saved_buffers[name])
        for name, layer in self._layers.items():
            layer.gate_cache.step = self.state.gates_moved[name]
            layer.discard_activity()
        for layer in self._layers.values():
            layer.activity()
        if self._optimizers is not None:
            # Copies: what was read may lie in the file still.
            self._optimizers.load_state(self._names, {name: value.clone() for name, value in self._kept.items()})
            self._random.put()


def check_values(kind: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that tensors fit those that they are to be copied into, and are finite where those are.

    Raises:
        ValueError: names the first that does not.
    """
    for name in dict.fromkeys([*expected, *found]):
        if name not in expected:
            raise ValueError(f"{kind} {name[:60]!r} has no place in this model")
        if name not in found:
            raise ValueError(f"{kind} {name!r} is missing")
        value, place = found[name], expected[name]
        if value.shape != place.shape or value.dtype != place.dtype:
            raise ValueError(
                f"{kind} {name!r} has shape {list(value.shape)} and dtype {value.dtype}, expected {list(place.shape)} "
                f"and {place.dtype}"
            )
        # A mask may hold minus infinity, and does from the start.
        if not bool((torch.isfinite(value) | ~torch.isfinite(place).cpu()).all()):
            raise ValueError(f"{kind} {name!r} is not finite")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file of a run.

    Raises:
        CheckpointError: it is missing or damaged, or no regular file.
    """
    require_file(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"{path} is not a readable safetensors file ({str(error)[:200]}); use another checkpoint"
        ) from error


def _by_kind(path: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by their kinds."""
    check_digest(path)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "buffer": {}, "optimizer": {}, "random": {}}
    for key, value in read_tensors(path).items():
        kind, _, name = key.partition(".")
        if kind not in parts:
            raise DamagedCheckpointError(
                f"{path} holds {key[:60]!r}, which is no part of a checkpoint; use another checkpoint"
            )
        parts[kind][name] = value
    return parts


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
            # safetensors and mkdtemp make them for the owner alone.
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
            # Renamed first, so that a kill leaves no half checkpoint under a good name.
            gone = path.with_name(f".{path.name}.tmp-old")
            path.rename(gone)
            _discard(gone)


def _discard(path: Path) -> None:
    """Remove a folder, or a link to one; what cannot be removed stays."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _check_model(folder: Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    remedy = "resume with the model and settings of that run"
    if saved["class"] != present["class"]:
        raise CheckpointError(f"{folder} is of a {saved['class']}, this model is a {present['class']}; {remedy}")
    for name in dict.fromkeys([*saved["shapes"], *present["shapes"]]):
        before, now = saved["shapes"].get(name), present["shapes"].get(name)
        if before != now:
            raise CheckpointError(
                f"{folder} is of another {saved['class']}: {name!r} has shape {before or 'none'} there and "
                f"{now or 'none'} here; {remedy}"
            )
    odd = sorted(set(saved["trainable"]) ^ set(present["trainable"]))
    if odd:
        where = "there" if odd[0] in saved["trainable"] else "here"
        raise CheckpointError(f"{folder}: {odd[0]!r} is trainable only {where}; {remedy}")
    if saved["frozen"] != present["frozen"]:
        raise CheckpointError(
            f"{folder} was trained on other frozen weights than this {present['class']} has: shapes agree, values "
            f"do not; load the same pretrained weights"
        )


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    parameters = {name for name, _ in named_parameters(model, remove_duplicate=False)}
    return {
        name: value for name, value in state_of(model).items() if name not in parameters and isinstance(value, Tensor)
    }
