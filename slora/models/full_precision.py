"""What `modules_to_save` trains is kept in fp32 within a model of 16 bits, where small optimizer steps would be lost.

`torch.amp.GradScaler` takes no fp16 gradients either. Single parameters keep their dtype: the code that reads them is
not known, so its inputs could not be cast. Scalars are the exception, because they promote no other tensor.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from slora.models.injection_record import OriginalDtypes
from slora.models.modules_to_save import Saved
from slora.module_tree.wrappers import module_at, named_modules, parameter_at

DTYPES_16_BIT = (torch.float16, torch.bfloat16)


class Fp32Hooks:
    """Casts the inputs of a module in fp32 to fp32, and its outputs to the dtype of `like`, a tensor of the model.

    Under autocast outputs stay as they are: autocast finds a dtype for each operator by itself.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Forward pre-hook: the arguments in fp32."""
        if not self._differs(module):
            return None
        return tree_map(_to_fp32, args), tree_map(_to_fp32, kwargs)

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook: the output in the dtype of the rest of the model."""
        device = self.like.device.type
        if (device != "meta" and torch.is_autocast_enabled(device)) or not self._differs(module):
            return output
        return tree_map(self._from_fp32, output)

    def _from_fp32(self, value: Any) -> Any:
        return value.to(self.like.dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value

    def _differs(self, module: nn.Module) -> bool:
        """Whether the module is in fp32 and the rest is not: either may have been cast since."""
        own = next(module.parameters(), None)
        return own is not None and own.dtype == torch.float32 and self.like.dtype in DTYPES_16_BIT


def keep_in_fp32(model: nn.Module, saved: Saved) -> OriginalDtypes:
    """Cast to fp32 what `saved` names in 16 bits, and return what `restore_dtypes` needs."""
    trained = set(saved.of(model))
    rest = {p.dtype: p for p in model.parameters() if p not in trained}
    found: dict[str, Tensor] = {}
    for name in saved.parameters:
        parameter = parameter_at(model, name)
        if parameter.dim() == 0:
            found[name] = parameter
    for module_name in saved.modules:
        found |= {f"{module_name}.{key}": tensor for key, tensor in _tensors(module_at(model, module_name)).items()}
    found = {name: tensor for name, tensor in found.items() if tensor.dtype in DTYPES_16_BIT}
    original = tuple((name, rest.get(t.dtype, torch.empty(0, dtype=t.dtype))) for name, t in found.items())
    likes = {tensor: like for (_, like), tensor in zip(original, found.values(), strict=True)}
    for tensor in found.values():
        tensor.data = tensor.data.float()
    covered: set[nn.Module] = set()
    for name, module in named_modules(model):
        whole = name in saved.modules
        if module in covered:
            continue
        # A tied weight is also read by a module that `saved` does not name, which needs the hooks, too.
        own = _tensors(module).values() if whole else [p for p in module._parameters.values() if p is not None]
        like = next((likes[tensor] for tensor in own if tensor in likes and (whole or tensor.dim())), None)
        if whole:
            covered.update(module.modules())
        if like is not None:
            hooks = Fp32Hooks(like)
            module.register_forward_pre_hook(hooks.before, with_kwargs=True)
            module.register_forward_hook(hooks.after)
    return original


def restore_dtypes(model: nn.Module, original: OriginalDtypes) -> None:
    """Cast back what `keep_in_fp32` cast, to the dtype that the rest of the model has now, and remove the hooks."""
    if not original:
        return
    tensors = _tensors(model)
    for name, like in original:
        tensors[name].data = tensors[name].data.to(like.dtype)
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(cast(Any, hooks).items()):
                if isinstance(getattr(hook, "__self__", None), Fp32Hooks):
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


def _to_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in DTYPES_16_BIT else value
