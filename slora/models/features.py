"""Final features: the input of a model's head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from slora.errors import ConfigError
from slora.models.targets import head_names
from slora.module_tree.wrappers import module_at, unwrapped


def final_features(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function `images [n, ...] -> features [n, d]`, differentiable, in the model's present mode.

    Of a timm model what its head sees (`forward_head(forward_features(x), pre_logits=True)`), of an open_clip model
    `encode_image(x)`, of another one the input of its only output head.

    Raises:
        ConfigError: the model offers none of these.
    """
    found: Any = unwrapped(model)
    if callable(getattr(found, "forward_features", None)) and callable(getattr(found, "forward_head", None)):
        return lambda images: found.forward_head(found.forward_features(images), pre_logits=True)
    if callable(getattr(found, "encode_image", None)):
        return lambda images: found.encode_image(images)
    heads = list(dict.fromkeys(head_names(model)))
    if len(heads) != 1:
        raise ConfigError(
            f"{type(model).__name__} has neither timm's forward_features and forward_head, nor open_clip's "
            f"encode_image, nor a single output head (found {heads or 'none'}); give a function of its final features"
        )
    return lambda images: input_of(model, heads[0], images)[0]


def input_of(model: nn.Module, name: str, images: Tensor) -> tuple[Tensor, Any]:
    """Run `model(images)`; return what reaches its module `name` first, and what the model returns.

    Raises:
        ConfigError: the module is not called, or with something else than one tensor.
    """
    seen: list[tuple[Any, ...]] = []
    hook = module_at(model, name).register_forward_pre_hook(lambda module, args: seen.append(args))
    try:
        output = model(images)
    finally:
        hook.remove()
    if len(seen) != 1 or len(seen[0]) != 1 or not isinstance(seen[0][0], Tensor):
        raise ConfigError(f"{name!r} of {type(model).__name__} is not called once with one tensor per forward pass")
    return seen[0][0], output
