"""`Gated`: what the gates need to know of an adapted layer, and whether its gates were written since they were read.

PyTorch counts the writes to a tensor in its version counter. The gates of a layer are current while the counter, the
parameter and the threshold are those that the layer's activity was computed from.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import Tensor, nn

from slora.config import Inactive
from slora.module_tree.wrappers import named_modules

if TYPE_CHECKING:
    from slora.gates.cache import GateCache

GateKey = tuple[Tensor, int, float]
"""The gate parameter, its version counter and the threshold."""

# A key that matches no gate: read it again, though it is not known to have changed.
_UNVERIFIED: Any = (None, -1, 0.0)


class Activity(NamedTuple):
    """Which blocks of a layer are active, as the host knows it until the gates change."""

    active: tuple[int, ...]
    inactive: tuple[int, ...]
    probe: bool
    """Whether the gates of inactive blocks get an estimated gradient now."""
    probe_scale: float
    """Factor that keeps the estimate unbiased over steps where a probe runs only every few of them."""
    step: int
    """How often the gates of the model have changed; with the layer's own seed, the seed of the probe."""


class Gated(nn.Module):
    """A layer with gates: the base class of every adapted layer (`slora.layers`)."""

    gate: nn.Parameter
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    rank_gate: nn.Parameter | None
    blocks: int
    r: int
    threshold: float
    inactive: Inactive
    probe_every: int
    released: bool
    merged: bool
    injected_name: str = ""
    """The name that `inject` found the layer by."""
    warned_untrained: bool = False
    """Whether an `UntrainedLayerWarning` has named the layer."""
    gate_cache: GateCache
    """Shared by all layers of a model."""
    _activity: Activity | None
    _gate_key: GateKey | None
    _sharded_gate: nn.Parameter | None = None

    @property
    def gate_parameter(self) -> nn.Parameter:
        """The parameter that optimizers hold: FSDP puts a gathered copy in its place while the layer runs."""
        return self.gate if self._sharded_gate is None else self._sharded_gate

    def activity(self) -> Activity:
        """Return which blocks are active, without a device-to-host copy unless a gate has changed."""
        return self.gate_cache.activity(self)

    def set_activity(self, active: Sequence[bool], step: int, probe_due: bool, probe_scale: float) -> None:
        """Store what the gates say now, one flag per block, until they change."""
        exact, gate = self.inactive == "exact", self.gate_parameter
        # Through `__dict__`, here and below: this is done for every layer in every step, and `nn.Module.__setattr__`
        # takes longer than all the rest.
        self.__dict__["_activity"] = Activity(
            *_numbers(tuple(active)),
            probe=exact or (probe_due and self.inactive == "probe"),
            probe_scale=1.0 if exact else probe_scale,
            step=step,
        )
        self.__dict__["_gate_key"] = gate, version(gate), self.threshold

    def discard_activity(self) -> None:
        """Read the gates again at the next use, without counting that as a change of theirs."""
        self._activity = None

    def mark_gates_changed(self) -> None:
        """Read the gates of the model again at the next use, and count that as a change of theirs."""
        self.__dict__["_gate_key"] = None

    def mark_gates_unverified(self) -> None:
        """Read the gates of the model again at the next use; they count as changed only if other blocks are active."""
        if is_current(self):
            self._gate_key = _UNVERIFIED

    def gates_changed(self, active: Sequence[bool]) -> bool:
        """Whether the gates were written since the activity was stored; `active` is what they say now."""
        assert self._activity is not None
        if self._gate_key is not _UNVERIFIED and not is_current(self):
            return True
        return self._activity.active != _numbers(tuple(active))[0]

    def release(self) -> int:
        """Free the LoRA matrices for good and return the bytes; `slora.release_frozen` calls this."""
        raise NotImplementedError


AnyGated = TypeVar("AnyGated", bound=Gated)


def is_current(layer: Gated) -> bool:
    """Whether the gates of `layer` are those that its activity was computed from, without reading their values."""
    key = layer._gate_key
    if key is None:
        return False
    # Not `layer.gate`: attribute access to parameters is slow in nn.Module. A parametrized gate, and that of a
    # replica of DataParallel, are not in `_parameters`.
    gate = layer._parameters.get("gate")
    gate = layer.gate if gate is None else gate
    if key[0] is not gate:
        gate = layer._sharded_gate
    return key[0] is gate and gate is not None and key[1] == version(gate) and key[2] == layer.threshold


@functools.lru_cache(maxsize=1024)
def _numbers(active: tuple[bool, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The numbers of the active and of the inactive blocks."""
    numbers = range(len(active))
    return tuple(i for i in numbers if active[i]), tuple(i for i in numbers if not active[i])


def version(tensor: Any) -> int:
    """Return how often `tensor` was written; 0 for one made under `inference_mode`, which has no counter."""
    return 0 if tensor.is_inference() else tensor._version


def gated_layers(model: nn.Module) -> Iterator[tuple[str, Gated]]:
    """Yield `(name, layer)` for every layer of `model` that has gates, in the order of `named_modules`."""
    for name, module in named_modules(model):
        if isinstance(module, Gated):
            yield name, module
