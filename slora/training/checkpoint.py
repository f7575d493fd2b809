"""Checkpoints: a folder with `tensors.safetensors` and `state.json`, either complete or not there.

Kept is what training changes: trainable parameters, buffers, optimizer state, the random generators, where the run
stands, and how often the gates have moved (the seed of the probes). Frozen weights are only identified. The folder
is written under a temporary name, flushed and renamed; older ones go after that. Nothing is pickled. Which folders
there are, and which of them a run may go on from, is said in `checkpoint_folders.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slora.errors import CheckpointError
from slora.files import cannot_write, umask
from slora.gate import release_frozen
from slora.layers import adapted_layers
from slora.reading import read_json
from slora.training.checkpoint_folders import (
    FIXED,
    STATE,
    before,
    check_settings,
    checkpoints,
    chosen,
    newest,
    refuse_newer,
    step_of,
)
from slora.training.optimizers import Optimizers
from slora.training.settings import TrainSettings

__all__ = [
    "FIXED",
    "before",
    "check_settings",
    "checkpoints",
    "chosen",
    "fingerprint",
    "load",
    "load_model",
    "newest",
    "refuse_newer",
    "save",
    "step_of",
]

TENSORS = "tensors.safetensors"
FORMAT = 2


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
        "class": type(model).__name__,
        "shapes": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
        # Strategies take the gates in and out of training.
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad and p not in own],
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
        progress: `step` and `result` (with `best_step`) of the run so far; JSON values.

    Raises:
        WriteError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    target = folder / f"step-{progress['step']:08d}"
    if target.exists():
        return target
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"model.{name}": p.detach() for p, name in names.items() if p.requires_grad}
    # Gates that were freed by the policy "frozen" are not trainable any more, but they differ from the start.
    tensors |= {f"model.{name}.gate": layer.gate.detach() for name, layer in adapted_layers(model)}
    tensors |= {f"buffer.{name}": buffer for name, buffer in _buffers(model).items()}
    tensors |= {f"optimizer.{key}": value for key, value in optimizers.state(names).items()}
    tensors["random.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    state = {
        "format": FORMAT,
        "settings": settings.to_dict(),
        "model": identity,
        "gates_moved": {name: layer._mirror.step for name, layer in adapted_layers(model)},
        "freed": [name for name, layer in adapted_layers(model) if layer.released],
        "random": _random_state(),
        **progress,
    }
    _write(target, {key: value.detach().cpu().contiguous() for key, value in tensors.items()}, state)
    _remove_old(folder, settings.keep_last, progress["result"]["best_step"])
    return target


def load(
    folder: Path, model: nn.Module, optimizers: Optimizers, settings: TrainSettings, identity: dict[str, Any]
) -> dict[str, Any]:
    """Put a checkpoint back into a freshly prepared model and its optimizers; return its state.

    Everything is read and checked before anything changes.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or of another model or run; names what differs.
    """
    state, tensors = _read(folder)
    _check_model(folder, state["model"], identity)
    check_settings(folder, settings, state)
    _fill(folder, model, state, tensors, optimizers.release)
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    own = {key.removeprefix("optimizer."): value for key, value in tensors.items() if key.startswith("optimizer.")}
    optimizers.load_state(names, own)
    _set_random_state(state["random"], tensors)
    return state


def load_model(folder: Path, model: nn.Module, settings: TrainSettings) -> dict[str, Any]:
    """Put what a checkpoint says of the model into one that is freshly prepared, without its run; return its state.

    Raises:
        CheckpointError: see `load`.
    """
    state, tensors = _read(folder)
    _check_model(folder, state["model"], fingerprint(model))
    check_settings(folder, settings, state)
    _fill(folder, model, state, tensors, release_frozen)
    return state


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    state = read_json(folder / STATE)
    try:
        tensors = load_file(folder / TENSORS)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder / TENSORS} does not exist; use another checkpoint") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{folder / TENSORS} is not a readable safetensors file ({error}); use another checkpoint"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{folder / STATE} is not a checkpoint of this version of slora (format {FORMAT})")
    return state, tensors


def _fill(
    folder: Path,
    model: nn.Module,
    state: dict[str, Any],
    tensors: dict[str, Tensor],
    release: Callable[[nn.Module], int],
) -> None:
    """Put parameters, buffers and gates into `model`; `release` frees what the policy "frozen" had freed."""
    layers = dict(adapted_layers(model))
    freed = {f"{name}.{part}" for name in state["freed"] for part in ("lora_A", "lora_B", "gate")}
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in freed}
    buffers = _buffers(model)
    for kind, wanted in (("model", expected), ("buffer", buffers)):
        for name, value in wanted.items():
            saved = tensors.get(f"{kind}.{name}")
            if saved is None or saved.shape != value.shape:
                shape = "is missing" if saved is None else f"has shape {list(saved.shape)}"
                raise CheckpointError(
                    f"{folder / TENSORS}: {name} {shape}, expected {list(value.shape)}; it may be damaged"
                )
    with torch.no_grad():
        for name, layer in layers.items():
            layer.gate.copy_(tensors[f"model.{name}.gate"])
        if state["freed"]:
            release(model)
        # Blocks that went off at the very last step are freed here already, a step early.
        gone = {part for layer in layers.values() if layer.released for part in (layer.lora_A, layer.lora_B)}
        for name, value in expected.items():
            if value not in gone:
                value.copy_(tensors[f"model.{name}"])
        for name, buffer in buffers.items():
            buffer.copy_(tensors[f"buffer.{name}"])
    for name, layer in layers.items():
        layer._mirror.step, layer._activity = state["gates_moved"][name], None
    for layer in layers.values():
        layer.activity()


def _write(target: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(".step-*.tmp-*"):
            _discard(left)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.tmp-"))
        save_file(tensors, temporary / TENSORS)
        (temporary / STATE).write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
        for path in (temporary / TENSORS, temporary / STATE, temporary):
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
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if name not in parameters and isinstance(value, Tensor)
    }


def _random_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def _set_random_state(state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["random.torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"random.cuda.{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"random.cuda.{i}"], i)
