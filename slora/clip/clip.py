"""`Clip`: an open_clip model with what its two towers take."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from slora.models.input_spec import InputSpec


class Clip(NamedTuple):
    """An image and a text tower; `slora.sources.models.build_clip` builds one by name."""

    model: nn.Module
    """An open_clip `CLIP` or `CustomTextCLIP`: `encode_image(images, normalize)`, `encode_text(tokens, normalize)` and
    the parameter `logit_scale`, the logarithm of the factor on cosine similarities."""
    tokenizer: Callable[[list[str]], Tensor]
    """Texts as int64 tokens `[n, context]`."""
    input: InputSpec
    templates: tuple[str, ...] = ()
    """Prompts that suit it, with `{}` for the name of the class; empty: open_clip's for ImageNet."""
