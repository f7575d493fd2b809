"""Reading a checkpoint: `Checkpoint` checks all of it first; `restore` then puts it into model and optimizers.

What a checkpoint holds is said in `checkpoint_save.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slora.adapters.tensors import read_safetensors
from slora.errors import CheckpointError, ConfigError, DamagedCheckpointError
from slora.gates.release import release_frozen
from slora.layers import adapted_layers
from slora.module_tree.wrappers import named_parameters
from slora.runs.checkpoint_folders import check_settings
from slora.runs.checkpoint_state import TENSORS, check_digest, read_state
from slora.runs.settings import TrainSettings
from slora.selection import Strategy
from slora.training import random_states
from slora.training.checkpoint_save import buffers_of
from slora.training.fingerprint import check_same_model
from slora.training.optimizers import Optimizers


class Checkpoint:
    """A checkpoint, read and checked for a freshly prepared model, which has not changed yet.

    Args:
        folder: the checkpoint.
        identity: `fingerprint(model)`.
        optimizers: those of the resumed run; None to restore the model alone.

    Attributes:
        state: everything but the tensors.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or of another model or run; names the difference.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        settings: TrainSettings,
        identity: dict[str, Any],
        optimizers: Optimizers | None = None,
    ) -> None:
        self.folder = folder
        self.state = state = read_state(folder)
        check_same_model(folder, state.model, identity)
        check_settings(folder, settings, state)
        self._model, self._optimizers = model, optimizers
        self._layers = dict(adapted_layers(model))
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in named_parameters(model)}
        tensors = _by_group(folder / TENSORS)
        self._values, self._optimizer_state = tensors["model"], tensors["optimizer"]
        if tensors["selection"] and state.selection is not None:
            # Checked by the strategy (`check_run`).
            state.selection["tensors"] = tensors["selection"]
        try:
            self._random = random_states.parsed(state.random, tensors["random"])
            freed = {f"{name}.{key}" for name in state.freed for key in ("lora_A", "lora_B", "gate", "rank_gate")}
            self._expected = {n: p for n, p in named_parameters(model) if p.requires_grad and n not in freed}
            gates = {f"{name}.gate": layer.gate for name, layer in self._layers.items()}
            check_values("model", self._values, self._expected | gates)
            self._check_blocks()
            self._buffers, self._saved_buffers = buffers_of(model), tensors["buffer"]
            check_values("buffer", self._saved_buffers, self._buffers)
            if optimizers is not None:
                optimizers.check_state(self._names, self._optimizer_state, {*freed, *state.stateless}, state.step)
        except (ValueError, KeyError, TypeError) as error:
            said = f"{error} is missing" if isinstance(error, KeyError) else error
            raise DamagedCheckpointError(f"{folder} is damaged: {said}; use another checkpoint") from error

    def _check_blocks(self) -> None:
        """Check the state's entries about blocks against layers and gates."""
        layers, state = self._layers, self.state
        if state.gates_moved.keys() != layers.keys() or len(set(state.gates_moved.values())) > 1:
            raise ValueError("'gates_moved' does not fit these layers, whose gates move together")
        for name in state.freed:
            if name not in layers or layers[name].inactive != "frozen":
                raise ValueError(f"{name[:60]!r} is not a layer that inactive='frozen' can have freed")
            if bool((self._values[f"{name}.gate"] >= layers[name].threshold).any()):
                raise ValueError(f"{name!r} was freed, but one of its blocks is active")
        for _, blocks in state.result["active_blocks"]:
            for name, numbers in zip(layers, blocks, strict=True):
                if any(number >= layers[name].blocks for number in numbers):
                    raise ValueError(f"'active_blocks' holds block {max(numbers)} of {name!r}, which has fewer blocks")

    def check_run(self, steps: int, processes: int, selection: Strategy | None) -> None:
        """Check that a run of `steps` steps in `processes` processes can resume from here.

        Args:
            selection: the strategy of the run.

        Raises:
            CheckpointError: the checkpoint is of another number of processes, or its strategy state is damaged.
            ConfigError: it is beyond `steps`, or of another strategy.
        """
        folder, state = self.folder, self.state
        if state.processes != processes:
            raise CheckpointError(
                f"{folder} is of a run in {state.processes} process{'es' * (state.processes > 1)}, this one has "
                f"{processes}, so that its steps would have other images; resume with as many "
                f"(torchrun --nproc_per_node {state.processes})"
            )
        if state.step > steps:
            raise ConfigError(
                f"{folder} is at step {state.step}, beyond max_steps={steps}; resume with more steps, or from an "
                f"earlier checkpoint"
            )
        if (selection is None) != (state.selection is None):
            raise DamagedCheckpointError(
                f"{folder} is damaged: it has no strategy, or one too many; use another checkpoint"
            )
        if selection is not None and state.selection is not None:
            selection.check_state(state.selection)

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the checkpoint into the model and, if there are optimizers, into them and the random generators."""
        for name, layer in self._layers.items():
            layer.gate.copy_(self._values[f"{name}.gate"])
        if self.state.freed:
            (release_frozen if self._optimizers is None else self._optimizers.release)(self._model)
        # Layers whose last block was switched off at the very last step are freed here, a step early.
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
            # Copies: the tensors may be memory-mapped from the file.
            self._optimizers.load_state(
                self._names, {name: value.clone() for name, value in self._optimizer_state.items()}
            )
            self._random.restore()


def check_values(kind: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that tensors can be copied into those of a model, and are finite where these are.

    Raises:
        ValueError: names the first that does not.
    """
    for name in dict.fromkeys([*expected, *found]):
        if name not in expected:
            raise ValueError(f"{kind} {name[:60]!r} is not in this model")
        if name not in found:
            raise ValueError(f"{kind} {name!r} is missing")
        value, own = found[name], expected[name]
        if value.shape != own.shape or value.dtype != own.dtype:
            raise ValueError(
                f"{kind} {name!r} has shape {list(value.shape)} and dtype {value.dtype}, expected {list(own.shape)} "
                f"and {own.dtype}"
            )
        # A mask may hold infinities from the start.
        if not bool((torch.isfinite(value) | ~torch.isfinite(own).cpu()).all()):
            raise ValueError(f"{kind} {name!r} is not finite")


def _by_group(path: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint, grouped by the first part of their names."""
    check_digest(path)
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "buffer": {}, "optimizer": {}, "selection": {}, "random": {}}
    for key, value in read_safetensors(path, "use another checkpoint", DamagedCheckpointError).items():
        group, _, name = key.partition(".")
        if group not in groups:
            raise DamagedCheckpointError(
                f"{path} holds {key[:60]!r}, which does not belong to a checkpoint; use another checkpoint"
            )
        groups[group][name] = value
    return groups
