"""`BlockState`: how an adapted layer is moved, cast, copied, pickled, saved and loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slora.errors import StateError
from slora.gates.gated import Gated
from slora.module_tree.sharded import is_sharded

LORA_PARAMETERS = ("lora_A", "lora_B", "gate")
RANK_GATE = "rank_gate"
"""The optional parameter of a layer that scales its ranks (`slora.layers.ranks`)."""
_KEPT_FP32 = (*LORA_PARAMETERS, RANK_GATE)


class BlockState(Gated):
    """Keeps the LoRA parameters in fp32, and drops what was computed from parameters that have changed."""

    _cast: dict[str, tuple[tuple[Any, ...], Tensor]]
    """Base weight and bias in the dtype of autocast, each with what it was cast from."""
    _ready: tuple[Any, ...] | None
    """The operands of the last call, checked, with what they were made from (`slora.layers.forward`)."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        parameters = (self._parameters.get(name) for name in _KEPT_FP32)
        own = {id(t): t for p in parameters if p is not None for t in (p, p.grad)}

        def keep_fp32(tensor: Tensor) -> Tensor:
            result: Tensor = fn(tensor)
            if id(tensor) not in own or result.dtype == tensor.dtype or result.element_size() >= 4:
                return result
            # The model is cast to 16 bits, in which most steps of a gate would round to nothing.
            return tensor.to(result.device, torch.float32)

        result = super()._apply(keep_fp32, recurse)  # type: ignore[no-untyped-call]
        self._cast.clear()
        self._activity = self._ready = None
        return result

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            # A parameter, the scaling, the threshold or the mode: the operands of the next call may be others.
            self.__dict__["_ready"] = None
            if name == "gate" and is_sharded(value):
                # Through `__dict__`: nn.Module would register it as one more parameter.
                self.__dict__["_sharded_gate"] = value
            if name in ("inactive", "probe_every") and self.__dict__.get("_activity") is not None:
                self.mark_gates_unverified()
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self.__dict__["_ready"] = None
        super().__delattr__(name)

    def train(self, mode: bool = True) -> Any:
        """See `nn.Module.train`. A change of mode reads the gates again: an average of weights may be in them."""
        if mode != self.training:
            self.mark_gates_unverified()
        return super().train(mode)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "merged"] = torch.ones((), dtype=torch.bool)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name = prefix[:-1] or type(self).__name__
        if self.merged:
            # `slora.unmerge` would put the old weight back over the loaded one.
            raise StateError(f"{name!r} is merged; call slora.unmerge(model) before load_state_dict")
        if prefix + "merged" in state_dict:
            raise StateError(
                f"this state was saved while {name!r} was merged, so its weight holds the update already; save it "
                f"after slora.unmerge(model)"
            )
        incoming = state_dict.get(prefix + "lora_A")
        if isinstance(incoming, Tensor) and incoming.dim() == 3 and incoming.shape[1] == 0 and not self.released:
            self.release()
        for key in (prefix + own for own in _KEPT_FP32):
            value = state_dict.get(key)
            if isinstance(value, Tensor) and value.is_floating_point() and value.element_size() < 4:
                # With assign=True it would become the parameter. `state_dict` is a copy of the caller's.
                state_dict[key] = value.float()
        self._ready = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {
            "_cast": {},
            "_ready": None,
            "_activity": None,
            "_gate_key": None,
            "warned_untrained": False,
        }
        return {**self.__dict__, **fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.gate_cache.add(self)
