"""Modules and single parameters that `modules_to_save` selects: trained in full and saved with the adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from slora.config import SelectiveLoRAConfig
from slora.layers import adapted_layers
from slora.module_tree.names import ends_with, inside, no_match
from slora.module_tree.wrappers import module_at, named_modules, named_parameters, parameter_at, state_of


class Saved(NamedTuple):
    """Full names of what is trained in full."""

    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    """Those in none of `modules`."""

    def of(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """Yield the parameters of `model` that are trained in full."""
        for name in self.modules:
            yield from module_at(model, name).parameters()
        for name in self.parameters:
            yield parameter_at(model, name)

    def buffers(self, model: nn.Module) -> set[str]:
        """Return the names of those of `tensors` that are buffers."""
        tensors = self.tensors(model)
        if not tensors:
            return set()
        return tensors.keys() - {name for name, _ in named_parameters(model, remove_duplicate=False)}

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return `{full name: tensor}`: single parameters, then the parameters and buffers of modules."""
        found: dict[str, Tensor] = {name: parameter_at(model, name) for name in self.parameters}
        for name in self.modules:
            found |= {f"{name}.{key}": value for key, value in state_of(module_at(model, name)).items()}
        return found


def saved_parts(model: nn.Module, config: SelectiveLoRAConfig) -> Saved:
    """Return what `config.modules_to_save` selects in `model`: an entry is a name, or the end of one.

    Raises:
        TargetError: an entry matches neither a module nor a parameter; near names are listed.
    """
    modules = [name for name, _ in named_modules(model) if name]
    parameters = [name for name, _ in named_parameters(model, remove_duplicate=False)]
    chosen: list[str] = []
    single: list[str] = []
    for entry in dict.fromkeys(config.modules_to_save or ()):
        hits = [name for name in modules if ends_with(name, entry)]
        own = [name for name in parameters if ends_with(name, entry)]
        if not hits and not own:
            raise no_match("modules_to_save", entry, [*modules, *parameters], "module or parameter")
        chosen += [hit for hit in hits if hit not in chosen]
        single += [name for name in own if name not in single]
    return Saved(tuple(chosen), tuple(name for name in single if not inside(name, chosen)))


def unsaved(model: nn.Module, saved: Saved) -> list[str]:
    """Return the names of parameters that require gradients but are neither in `saved` nor an adapted layer's own."""
    layers = [layer for _, layer in adapted_layers(model)]
    known = {id(part) for layer in layers for part in (layer.lora_A, layer.lora_B, layer.gate, layer.rank_gate)}
    known.update(map(id, saved.of(model)))
    return [name for name, p in named_parameters(model) if p.requires_grad and id(p) not in known]
