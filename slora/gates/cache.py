"""`GateCache`: the host's copy of which blocks of a model are active.

It notices an edit by the version counter that PyTorch keeps for each parameter, and an optimizer step by a hook,
because fused optimizers do not increment the counter. Then it refreshes all layers of the model with a single
device-to-host copy. So eager mode can skip whole kernel launches without asking the device.

A write that increments no version counter, as `parameter.data.copy_(average)` does, is noticed when the gates are read
for another reason: whenever the model switches between training and evaluation, and when it is saved, merged or
summarised (`refresh_gates`).

During a backward pass no gate is read. A forward inside a backward pass is the recomputation of activation
checkpointing, which has to use the blocks of the first forward, even if an optimizer that steps in the backward has
changed gates since.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from slora.errors import NarrowParameterWarning, StateError
from slora.gates.gated import Activity, Gated, gated_layers, is_current
from slora.gates.optimizer_rules import saved_too_narrow
from slora.module_tree.sharded import full


class GateCache:
    """The activity of all adapted layers of one model, on the host.

    Layers add themselves when they are made; the cache keeps no layer alive. A copy of the model (deepcopy, pickle)
    starts a cache of its own.

    Attributes:
        step: how often the gates were seen to have changed; not the optimizer's step.
        strategy: the strategy at work on the model (`slora.selection`), or None.
        asked: the budget that the blocks were chosen by, as in "budget=4"; empty where the gates decide.
        copies: device-to-host copies made so far, one per refresh and device.
        warned: whether a `GateRuleWarning` was given for this model.
        trained_in_full: parameters of `modules_to_save`; empty in a copy of the model.
        warned_narrow: whether a `NarrowParameterWarning` was given for this model.
        ddp: the `DistributedDataParallel` that last ran the model, or None.
        penalised: whether a loss may contain `gate_penalty`: False from the making of a `ProximalGates`
            until `gate_penalty` is called.
        without_gradient: parameters whose gradient, zeros made by DDP, is dropped before the optimizer step.
    """

    def __init__(self) -> None:
        self.step = 0
        self.copies = 0
        self.warned = False
        self.trained_in_full: list[weakref.ref[nn.Parameter]] = []
        self.warned_narrow = False
        self.strategy: Any = None
        self.asked = ""
        self.ddp: weakref.ref[nn.Module] | None = None
        self.penalised = True
        self.without_gradient: dict[nn.Parameter, None] = {}
        self._layers: list[weakref.ref[Gated]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> GateCache:
        copy = GateCache()
        copy.step, copy.asked = self.step, self.asked
        memo[id(self)] = copy
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {**GateCache().__dict__, "step": self.step, "asked": self.asked}

    def add(self, layer: Gated) -> None:
        """Refresh `layer` together with the others from now on."""
        self._layers.append(weakref.ref(layer))
        _gate_caches.add(self)

    def set_ddp(self, ddp: nn.Module) -> None:
        """Note that `ddp` runs the model."""
        if self.ddp is None or self.ddp() is not ddp:
            self.ddp = weakref.ref(ddp)

    def activity(self, layer: Gated) -> Activity:
        """Return the activity of `layer`, refreshed for the whole model if a gate has changed since."""
        if layer._activity is None or not (is_current(layer) or _in_backward()):
            self._refresh()
        assert layer._activity is not None
        return layer._activity

    def refresh(self) -> None:
        """Read all gates, whether or not one is known to have changed."""
        if not _in_backward():
            self._refresh()

    def layers(self) -> list[Gated]:
        """Return the layers that were added and are still alive."""
        return [layer for ref in self._layers if (layer := ref()) is not None]

    def warn_of_narrow(self, trained: set[int], stacklevel: int) -> None:
        """Warn once if one of `trained_in_full`, among the parameters whose ids are `trained`, has 16 bits."""
        for ref in () if self.warned_narrow else self.trained_in_full:
            p = ref()
            if p is not None and id(p) in trained and p.is_floating_point() and p.dtype.itemsize < 4:
                self.warned_narrow = True
                warnings.warn(saved_too_narrow(p.dtype), NarrowParameterWarning, stacklevel=stacklevel + 1)
                return

    def mark_changed(self, parameters: set[int]) -> None:
        """Note that the parameters with these ids were written, whatever their version counters say."""
        layers = self.layers()
        if any(id(layer.gate_parameter) in parameters for layer in layers):
            for layer in layers:
                layer.mark_gates_changed()

    def set_active(self, active: Mapping[Gated, Sequence[bool]]) -> None:
        """Record a write whose result the host knows, so that no copy from the device is needed."""
        self.step += 1
        whole = {id(layer) for layer in self.layers()} == {id(layer) for layer in active}
        if whole and not _in_backward():
            self._store(active)
        else:
            for layer in active:
                layer.mark_gates_changed()

    def _refresh(self) -> None:
        layers = self.layers()
        self._layers = [weakref.ref(layer) for layer in layers]
        active = self._read(layers)
        known = [layer for layer in layers if layer._activity is not None]
        if any(layer.gates_changed(active[layer]) for layer in known):
            self.step += 1
        elif len(known) == len(layers) and all(map(is_current, layers)):
            return
        self._store(active)

    def _store(self, active: Mapping[Gated, Sequence[bool]]) -> None:
        none_active = not any(any(on) for on in active.values())
        for layer, on in active.items():
            # While no block is active, no gate changes without a probe: the step count would stand still, and no later
            # probe would fall due.
            due = none_active or self.step % layer.probe_every == 0
            layer.set_activity(on, self.step, due, 1.0 if none_active else float(layer.probe_every))

    def _read(self, layers: list[Gated]) -> dict[Gated, list[bool]]:
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[Gated, nn.Parameter]]] = {}
        for layer in layers:
            gate = layer.gate_parameter
            groups.setdefault((gate.device, gate.dtype), []).append((layer, gate))
        result: dict[Gated, list[bool]] = {}
        for (device, _), members in groups.items():
            if device.type == "meta":
                raise StateError(
                    "the gates are on meta, where they have no values; call model.to_empty(device=...), load the base "
                    "weights, and then layer.reset_parameters() of each adapted layer or slora.load_adapter"
                )
            with torch.no_grad():
                gates = torch.cat([full(gate) for _, gate in members])
            thresholds = [layer.threshold for layer, gate in members for _ in range(gate.shape[0])]
            if len(set(thresholds)) == 1:
                flags = gates >= thresholds[0]
            else:
                flags = gates >= gates.new_tensor(thresholds)
            values = iter(flags.tolist())
            self.copies += 1
            for layer, gate in members:
                result[layer] = list(itertools.islice(values, gate.shape[0]))
        return result


_gate_caches: weakref.WeakSet[GateCache] = weakref.WeakSet()


def gate_caches() -> list[GateCache]:
    """Return those of all models that are alive."""
    return list(_gate_caches)


GatesOfGroup = list[tuple[nn.Parameter, GateCache]]
"""The gates in a parameter group of an optimizer, each with the cache of its model."""


def find_gates(groups: list[dict[str, Any]]) -> dict[int, GatesOfGroup]:
    """Return `{number of the group: its gates}` for each of the optimizer's parameter groups that holds gates."""
    owner = {id(layer.gate_parameter): cache for cache in gate_caches() for layer in cache.layers()}
    found = {i: [(p, owner[id(p)]) for p in group["params"] if id(p) in owner] for i, group in enumerate(groups)}
    return {i: members for i, members in found.items() if members}


def refresh_gates(model: nn.Module) -> None:
    """Read the gates of `model`, in one copy per device: a write through `.data` is noticed here."""
    for cache in {layer.gate_cache for _, layer in gated_layers(model)}:
        cache.refresh()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _after_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    # Fused optimizers write parameters without incrementing their version counters. And a layer whose own gate got no
    # gradient has to learn of the step before its forward: its probe may be due.
    if torch.compiler.is_compiling():
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for cache in gate_caches():
        cache.mark_changed(stepped)


register_optimizer_step_post_hook(_after_optimizer_step)
