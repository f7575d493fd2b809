"""What `modules_to_save` trains, in fp32 within a model of 16 bits, where the small steps of an optimizer are lost.

`torch.amp.GradScaler` takes no fp16 gradients either. Single parameters keep their dtype, unless they are scalars,
which promote nothing: what reads them is not known, so that it could not be given the dtype it expects.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from slora.models.modules_to_save import Saved
from slora.module_tree.wrappers import module_at, named_modules, parameter_at

NARROW = (torch.float16, torch.bfloat16)


Kept = tuple[tuple[str, Tensor], ...]
"""Names of tensors in fp32, each with a tensor of the dtype that it had, such as a parameter of the model around."""


class Wide:
    """Gives a module in fp32 its inputs in fp32, and the rest of the model its outputs in the dtype of `like`.

    Under autocast outputs stay as they are: autocast finds a dtype for each operator by itself.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like

    def widen(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Forward pre-hook: the arguments in fp32."""
        if not self._differs(module):
            return None
        return tree_map(_wider, args), tree_map(_wider, kwargs)

    def narrow(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook: the output in the dtype of the model around."""
        device = self.like.device.type
        if (device != "meta" and torch.is_autocast_enabled(device)) or not self._differs(module):
            return output
        return tree_map(self._narrower, output)

    def _narrower(self, value: Any) -> Any:
        wide = isinstance(value, Tensor) and value.dtype == torch.float32
        return value.to(self.like.dtype) if wide else value

    def _differs(self, module: nn.Module) -> bool:
        """Whether the module is in fp32 and the model is not, since either may have been cast."""
        own = next(module.parameters(), None)
        return own is not None and own.dtype == torch.float32 and self.like.dtype in NARROW


def widen(model: nn.Module, saved: Saved) -> Kept:
    """Keep in fp32 what `saved` names in 16 bits; return what `unwiden` needs."""
    trained = set(saved.of(model))
    around = {p.dtype: p for p in model.parameters() if p not in trained}
    found: dict[str, Tensor] = {}
    for name in saved.parameters:
        parameter = parameter_at(model, name)
        if parameter.dim() == 0:
            found[name] = parameter
    for module_name in saved.modules:
        found |= {f"{module_name}.{key}": tensor for key, tensor in _tensors(module_at(model, module_name)).items()}
    found = {name: tensor for name, tensor in found.items() if tensor.dtype in NARROW}
    kept = tuple((name, around.get(t.dtype, torch.empty(0, dtype=t.dtype))) for name, t in found.items())
    likes = {tensor: like for (_, like), tensor in zip(kept, found.values(), strict=True)}
    for tensor in found.values():
        tensor.data = tensor.data.float()
    covered: set[nn.Module] = set()
    for name, module in named_modules(model):
        whole = name in saved.modules
        if module in covered:
            continue
        # A tied weight is read by a module that is not named, too; a scalar by anyone, and promotes nothing.
        own = _tensors(module).values() if whole else [p for p in module._parameters.values() if p is not None]
        like = next((likes[tensor] for tensor in own if tensor in likes and (whole or tensor.dim())), None)
        if whole:
            covered.update(module.modules())
        if like is not None:
            wide = Wide(like)
            module.register_forward_pre_hook(wide.widen, with_kwargs=True)
            module.register_forward_hook(wide.narrow)
    return kept


def unwiden(model: nn.Module, kept: Kept) -> None:
    """Give back the dtypes of the model around, and take the hooks away."""
    tensors = _tensors(model)
    for name, like in kept:
        tensors[name].data = tensors[name].data.to(like.dtype)
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(cast(Any, hooks).items()):
                if isinstance(getattr(hook, "__self__", None), Wide):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their names in the plain model."""
    return {
        f"{name}.{key}" if name else key: tensor
        for name, part in named_modules(module, remove_duplicate=False)
        for key, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None
    }


def _wider(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in NARROW else value
