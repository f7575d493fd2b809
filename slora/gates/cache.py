"""Which blocks are active, as the host knows it.

`GateMirror` is the host's copy of every block's activity. It notices an optimizer step or an edit by the
version counter that PyTorch keeps for each parameter, and then refreshes all layers of the model with a single
device-to-host copy, so that eager mode can skip whole launches without asking the device.

A write that moves no counter, as `parameter.data.copy_(average)` does, is seen when gates are read again: whenever the
model changes between training and evaluation, and by whatever saves, merges or reports it (`reread`).

Within a backward pass no gate is read: a forward in there is the recomputation of a checkpointed one, which has to
decide as that did, though optimizers that step in the backward have moved gates by then.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from slora.config import Inactive
from slora.errors import NarrowParameterWarning, StateError
from slora.gates.optimizer_rules import saved_too_narrow
from slora.module_tree.sharded import full
from slora.module_tree.wrappers import named_modules


class Activity(NamedTuple):
    """What the host knows about the blocks of one layer until the gates move."""

    active: tuple[int, ...]
    inactive: tuple[int, ...]
    probe: bool
    """Whether the gates of inactive blocks get an estimated gradient now."""
    probe_scale: float
    """Factor that makes probing only now and then unbiased over steps."""
    step: int
    """How often the gates of the model have moved: together with the layer, the seed of the probe."""


class Gated(nn.Module):
    """What gates need to know of a layer that has some: the base of every adapted layer (`slora.layers`)."""

    gate: nn.Parameter
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    blocks: int
    threshold: float
    inactive: Inactive
    probe_every: int
    released: bool
    merged: bool
    _name: str = ""
    """The name that `inject` found the layer by."""
    _named: bool = False
    """Whether an `UntrainedLayerWarning` has named the layer."""
    _mirror: GateMirror
    _activity: Activity | None
    _gate_key: tuple[Tensor, int, float] | None
    _sharded_gate: nn.Parameter | None = None

    @property
    def moving_gate(self) -> nn.Parameter:
        """The parameter that optimizers move: FSDP puts a gathered copy in its place while the layer runs."""
        return self.gate if self._sharded_gate is None else self._sharded_gate

    def activity(self) -> Activity:
        """Return which blocks are active, without a device-to-host copy unless a gate has moved."""
        return self._mirror.activity(self)

    def release(self) -> int:
        """Free the LoRA matrices for good and return the bytes; `slora.release_frozen` calls this."""
        raise NotImplementedError


AnyGated = TypeVar("AnyGated", bound=Gated)


class GateMirror:
    """The activity of all adapted layers of one model, on the host.

    Layers join when they are made; the mirror keeps no layer alive. A copy of the model (deepcopy, pickle)
    starts a mirror of its own.

    Attributes:
        step: how often the gates were seen to have moved.
        strategy: what is at work on the model (`slora.selection`), or None.
        asked: the budget that the blocks were chosen by, as in "budget=4"; empty where the gates decide.
        copies: device-to-host copies made so far, one per refresh and device.
        warned: whether a `GateRuleWarning` was given for this model.
        saved: parameters of the modules that are trained in full; a copy of the model does not know of its own.
        warned_saved: whether a `NarrowParameterWarning` was given for this model.
        ddp: the `DistributedDataParallel` that last ran the model, or None.
        penalised: whether a loss may hold `gate_penalty`: not where `ProximalGates` is made, until it is called.
        idle: parameters to which it gives zeros for a gradient where one process gives none.
    """

    def __init__(self) -> None:
        self.step = 0
        self.copies = 0
        self.warned = False
        self.saved: list[weakref.ref[nn.Parameter]] = []
        self.warned_saved = False
        self.strategy: Any = None
        self.asked = ""
        self.ddp: weakref.ref[nn.Module] | None = None
        self.penalised = True
        self.idle: dict[nn.Parameter, None] = {}
        self._layers: list[weakref.ref[Gated]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> GateMirror:
        copy = GateMirror()
        copy.step, copy.asked = self.step, self.asked
        memo[id(self)] = copy
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {**GateMirror().__dict__, "step": self.step, "asked": self.asked}

    def join(self, layer: Gated) -> None:
        """Refresh `layer` together with the others from now on."""
        self._layers.append(weakref.ref(layer))
        _mirrors.add(self)

    def within(self, ddp: nn.Module) -> None:
        """Note that `ddp` runs the model."""
        if self.ddp is None or self.ddp() is not ddp:
            self.ddp = weakref.ref(ddp)

    def activity(self, layer: Gated) -> Activity:
        """Return the activity of `layer`, refreshed for the whole model if a gate has moved since."""
        if layer._activity is None or not (unmoved(layer) or _in_backward()):
            self._refresh()
        assert layer._activity is not None
        return layer._activity

    def reread(self) -> None:
        """Read all gates, whether or not one is known to have moved."""
        if not _in_backward():
            self._refresh()

    def layers(self) -> list[Gated]:
        """Return the layers that have joined and are still alive."""
        return [layer for ref in self._layers if (layer := ref()) is not None]

    def warn_of_narrow(self, trained: set[int], stacklevel: int) -> None:
        """Warn once where one of `saved`, whose ids are in `trained`, is in 16 bits."""
        for ref in () if self.warned_saved else self.saved:
            p = ref()
            if p is not None and id(p) in trained and p.is_floating_point() and p.dtype.itemsize < 4:
                self.warned_saved = True
                warnings.warn(saved_too_narrow(p.dtype), NarrowParameterWarning, stacklevel=stacklevel + 1)
                return

    def _refresh(self) -> None:
        layers = self.layers()
        self._layers = [weakref.ref(layer) for layer in layers]
        active = self._read(layers)
        known = [layer for layer in layers if layer._activity is not None]
        if any(_moved(layer, active[layer]) for layer in known):
            self.step += 1
        elif len(known) == len(layers) and all(map(unmoved, layers)):
            return
        self._note(active)

    def _note(self, active: Mapping[Gated, Sequence[bool]]) -> None:
        none_active = not any(any(on) for on in active.values())
        for layer, on in active.items():
            # With nothing active no gate moves by itself, so no step would be noticed and no probe be due.
            due = none_active or self.step % layer.probe_every == 0
            layer._activity = Activity(
                active=tuple(i for i, a in enumerate(on) if a),
                inactive=tuple(i for i, a in enumerate(on) if not a),
                probe=layer.inactive == "exact" or (layer.inactive == "probe" and due),
                probe_scale=1.0 if none_active or layer.inactive == "exact" else float(layer.probe_every),
                step=self.step,
            )
            layer._gate_key = layer.moving_gate, version(layer.moving_gate), layer.threshold

    def _read(self, layers: list[Gated]) -> dict[Gated, list[bool]]:
        groups: dict[tuple[torch.device, torch.dtype], list[Gated]] = {}
        for layer in layers:
            groups.setdefault((layer.moving_gate.device, layer.moving_gate.dtype), []).append(layer)
        result: dict[Gated, list[bool]] = {}
        for (device, _), members in groups.items():
            if device.type == "meta":
                raise StateError(
                    "the gates are on meta, where they have no values; call model.to_empty(device=...), load the base "
                    "weights, and then layer.reset_parameters() of each adapted layer or slora.load_adapter"
                )
            gates = torch.cat([full(layer.moving_gate.detach()) for layer in members])
            thresholds = [layer.threshold for layer in members for _ in range(layer.gate.shape[0])]
            if len(set(thresholds)) == 1:
                flags = gates >= thresholds[0]
            else:
                flags = gates >= gates.new_tensor(thresholds)
            values = iter(flags.tolist())
            self.copies += 1
            for layer in members:
                result[layer] = [next(values) for _ in range(layer.gate.shape[0])]
        return result

    def _forget(self, moved: set[int]) -> None:
        layers = self.layers()
        if any(id(layer.moving_gate) in moved for layer in layers):
            for layer in layers:
                layer._gate_key = None

    def _wrote(self, active: Mapping[Gated, Sequence[bool]]) -> None:
        self.step += 1
        whole = {id(layer) for layer in self.layers()} == {id(layer) for layer in active}
        if whole and not _in_backward():
            self._note(active)
        else:
            for layer in active:
                layer._gate_key = None


_mirrors: weakref.WeakSet[GateMirror] = weakref.WeakSet()


def mirrors() -> list[GateMirror]:
    """Return those of all models that are alive."""
    return list(_mirrors)


GatesOfGroup = list[tuple[nn.Parameter, GateMirror]]
"""The gates in a parameter group of an optimizer, each with the cache of its model."""


def find_gates(groups: list[dict[str, Any]]) -> dict[int, GatesOfGroup]:
    """Return the gates in each of the parameter groups `groups` that holds some, by its number."""
    owner = {id(layer.moving_gate): mirror for mirror in mirrors() for layer in mirror.layers()}
    found = {i: [(p, owner[id(p)]) for p in group["params"] if id(p) in owner] for i, group in enumerate(groups)}
    return {i: members for i, members in found.items() if members}


def _after_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    # Fused optimizers write parameters without moving their version counters. And a layer whose own gate got no
    # gradient has to learn of the step before its forward: its probe may be due.
    if torch.compiler.is_compiling():
        return
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for mirror in mirrors():
        mirror._forget(moved)


register_optimizer_step_post_hook(_after_optimizer_step)

# The key of no gate: read it again, though it is not known to have moved.
_DOUBTED: Any = (None, -1, 0.0)


def doubt(layer: Gated) -> None:
    """Read the gates of the model again at the next use of `layer`."""
    if unmoved(layer):
        layer._gate_key = _DOUBTED


def reread(model: nn.Module) -> None:
    """Read the gates of `model` again, in one copy per device: a write through `.data` is noticed here."""
    for mirror in {layer._mirror for _, layer in gated_layers(model)}:
        mirror.reread()


def _moved(layer: Gated, active: Sequence[bool]) -> bool:
    """Whether the gates of `layer` were written since its activity was read, which is now `active`."""
    assert layer._activity is not None
    if layer._gate_key is not _DOUBTED and not unmoved(layer):
        return True
    return layer._activity.active != tuple(i for i, on in enumerate(active) if on)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def unmoved(layer: Gated) -> bool:
    """Whether the gates of `layer` are those that its activity was read from, without looking at them."""
    key = layer._gate_key
    if key is None:
        return False
    # Not as an attribute, which nn.Module takes its time for, unless it is a parametrization or a replica's.
    gate = layer._parameters.get("gate")
    gate = layer.gate if gate is None else gate
    if key[0] is not gate:
        gate = layer._sharded_gate
    return key[0] is gate and gate is not None and key[1] == version(gate) and key[2] == layer.threshold


def version(tensor: Any) -> int:
    """Return how often `tensor` was written; 0 for one made under `inference_mode`, which has no counter."""
    return 0 if tensor.is_inference() else tensor._version


def gated_layers(model: nn.Module) -> Iterator[tuple[str, Gated]]:
    """Yield `(name, layer)` for every layer of `model` that has gates, in the order of `named_modules`."""
    for name, module in named_modules(model):
        if isinstance(module, Gated):
            yield name, module
