"""`Injection`: what `slora.inject` did to a model, noted on the model itself."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from slora.config import SelectiveLoRAConfig
from slora.errors import StateError
from slora.layers import adapted_layers
from slora.models.modules_to_save import Saved
from slora.module_tree.wrappers import named_modules, unwrapped

OriginalDtypes = tuple[tuple[str, Tensor], ...]
"""Names of tensors that are kept in fp32, each with a tensor of the dtype to give back."""


class Injection(NamedTuple):
    """What `inject` did to a model."""

    config: SelectiveLoRAConfig
    modules_to_save: tuple[str, ...]
    parameters_to_save: tuple[str, ...] = ()
    original_dtypes: OriginalDtypes = ()
    layers: tuple[str, ...] = ()
    """The layers that were adapted."""

    @property
    def saved(self) -> Saved:
        """What is trained in full."""
        return Saved(self.modules_to_save, self.parameters_to_save)


def injection(model: nn.Module) -> Injection:
    """Return what `inject` was called with on `model`.

    Raises:
        StateError: `model` was not passed to `inject` itself.
    """
    found = find_injection(model)
    if found is None:
        raise StateError(_not_injected(model))
    return found


def find_injection(model: nn.Module) -> Injection | None:
    """Return what `inject` noted on `model` itself, or None."""
    found = unwrapped(model).__dict__.get("_slora")
    return found if isinstance(found, Injection) else None


def set_injection(model: nn.Module, record: Injection | None) -> None:
    """Note on `model` what `inject` did, or with None remove the note."""
    attributes = unwrapped(model).__dict__
    attributes.pop("_slora", None)
    if record is not None:
        attributes["_slora"] = record


def injected_submodule(model: nn.Module) -> str:
    """Return the name of the submodule of `model` that `inject` was called on, or ""."""
    return next((name for name, module in named_modules(model) if name and find_injection(module)), "")


def _not_injected(model: nn.Module) -> str:
    kind = type(unwrapped(model)).__name__
    inner = injected_submodule(model)
    if inner:
        plain = all(key.isidentifier() for key in inner.split("."))
        path = f"model.{inner}" if plain else f"model.get_submodule({inner!r})"
        return f"{kind} is not adapted itself, its {inner!r} is; pass that module, as in {path}"
    layers = [name for name, _ in adapted_layers(model)]
    if layers:
        return (
            f"{kind} holds adapted layers, the first {layers[0]!r}, but is not the module that slora.inject was called "
            f"on; pass that one"
        )
    return f"{kind} is not adapted; call slora.inject(model, config) on this very module first"
