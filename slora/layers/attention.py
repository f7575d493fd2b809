"""Attention whose query, key and value share one `in_proj_weight [3E, E]`: three LoRA blocks on it.

`SelectiveLoRAAttention` replaces `nn.MultiheadAttention`; `ProjectionAttention` adapts any other class that reads an
`in_proj_weight`, such as open_clip's own. Both keep the base's parameter names and add the update to activations, never
to the weights. The output projection is a `SelectiveLoRALinear` of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from slora.config import SelectiveLoRAConfig
from slora.errors import ConfigError, ShapeError, TargetError
from slora.gates.cache import GateCache
from slora.layers.base import LoRABlocks, of_layer
from slora.layers.fx import record_call
from slora.layers.weight_reads import call_watched


class _InProjection(LoRABlocks):
    """LoRA blocks on the `in_proj_weight` of an attention module."""

    weight_name = "in_proj_weight"
    bias_name = "in_proj_bias"

    @classmethod
    def choose_blocks(cls, config: SelectiveLoRAConfig, module: nn.Module, name: str) -> int:
        blocks = super().choose_blocks(config, module, name)
        if blocks % 3:
            raise ConfigError(
                f"blocks={blocks} does not split query, key and value{of_layer(name)} evenly; "
                f'use a multiple of 3 or blocks="auto"'
            )
        return blocks

    @classmethod
    def _automatic_blocks(cls, module: nn.Module, name: str) -> int:
        return 3


class SelectiveLoRAAttention(_InProjection, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with gated LoRA blocks on query, key and value.

    Same arguments, masks and return values. The fused inference path of PyTorch, which would skip the blocks,
    is never taken.
    """

    @classmethod
    def from_attention(
        cls,
        attention: nn.MultiheadAttention,
        config: SelectiveLoRAConfig,
        *,
        name: str = "",
        gate_cache: GateCache | None = None,
    ) -> SelectiveLoRAAttention:
        """Return an adapted layer that shares the parameters, hooks and mode of `attention`."""
        blocks = cls.choose_blocks(config, attention, name)
        layer = cls.__new__(cls)
        layer._adopt(attention)
        layer._add_blocks(config, blocks, name, gate_cache)
        return layer

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, {self._describe()}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return `(output, weights or None)` as `nn.MultiheadAttention.forward` does; shapes are its own."""
        if isinstance(query, Proxy):
            options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return record_call(self, query, key, value, *options)  # type: ignore[no-any-return]
        if is_causal and attn_mask is None:
            raise ShapeError("is_causal=True is a hint about attn_mask, which is None; pass the causal mask as well")
        key_padding_mask = _additive("key_padding_mask", key_padding_mask, query.dtype)
        attn_mask = _additive("attn_mask", attn_mask, query.dtype)
        batched = query.dim() == 3
        if not batched:
            query, key, value = _each(lambda t: t.unsqueeze(1), query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        batch_first = batched and self.batch_first
        # nn.MultiheadAttention computes on [length, batch, E]. On the CPU the layout affects the last bit, so it is the
        # same here; on a GPU the copies would cost more than equal bits are worth.
        as_base = query.device.type == "cpu"
        if batch_first and as_base:
            query, key, value = _each(lambda t: t.transpose(0, 1), query, key, value)
            batch_first = False
        q, k, v = self._project_in(query, key, value)
        if as_base:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if not batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        q, k, v = (t.view(*t.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for t in (q, k, v))
        length = k.shape[2]
        if self.bias_k is not None and self.bias_v is not None:
            k, v = self._appended(k, self.bias_k), self._appended(v, self.bias_v)
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, k.shape[2] - length)
        mask = None if mask is None else mask.to(q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = _softmax_scores(q * math.sqrt(1.0 / self.head_dim), k, mask)
            weights = F.dropout(weights, dropout) if dropout else weights
            output = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=causal)
        order = (0, 2, 1, 3) if batch_first else (2, 0, 1, 3)
        output = self.out_proj(output.permute(order).flatten(2))
        if not batched:
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output.transpose(0, 1) if self.batch_first and not batch_first else output, weights

    def _appended(self, k: Tensor, bias: Tensor) -> Tensor:
        """Append `bias [1, 1, E]` to the keys or values `[batch, heads, S, D]`, in the base's layout."""
        last = bias.to(k.dtype).view(1, 1, self.num_heads, self.head_dim).expand(1, k.shape[0], -1, -1)
        return torch.cat([k.permute(2, 0, 1, 3), last]).permute(1, 2, 0, 3)

    def _project_in(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        third = self.blocks // 3
        if key is value:
            if query is key:
                q, k, v = self.project(query).chunk(3, dim=-1)
                return q, k, v
            k, v = self.project(key, third, 2 * third).chunk(2, dim=-1)
            return self.project(query, 0, third), k, v
        return (
            self.project(query, 0, third),
            self.project(key, third, third),
            self.project(value, 2 * third, third),
        )

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, added: int) -> Tensor | None:
        """The additive mask `[batch or 1, heads or 1, L, S]`, or None where nothing is masked."""
        mask = None
        if attn_mask is not None:
            whole = attn_mask.dim() == 3
            mask = attn_mask.reshape(-1, self.num_heads, *attn_mask.shape[1:]) if whole else attn_mask[None, None]
        if padding is not None:
            columns = padding[:, None, None, :]
            mask = columns if mask is None else mask + columns
        return mask if mask is None or not added else F.pad(mask, (0, added))


class ProjectionAttention(_InProjection):
    """Any attention class with an `in_proj_weight [3E, E]`, running its own forward.

    While that forward runs, calls on `in_proj_weight` see the blocks (`slora.layers.weight_reads`); everything else is
    the class's own code. A forward that never reads the weight is an error: it would skip the blocks silently.
    """

    @classmethod
    def from_attention(
        cls,
        attention: nn.Module,
        config: SelectiveLoRAConfig,
        *,
        name: str = "",
        gate_cache: GateCache | None = None,
    ) -> ProjectionAttention:
        """Return an adapted layer that shares the parameters, hooks and mode of `attention`."""
        blocks = cls.choose_blocks(config, attention, name)
        layer = _blank(type(attention))
        layer._adopt(attention)
        layer._add_blocks(config, blocks, name, gate_cache)
        return layer

    def __reduce__(self) -> Any:
        return _rebuild, (self._base_class, self.__getstate__())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the class that was adapted."""
        if any(isinstance(value, Proxy) for value in (*args, *kwargs.values())):
            return record_call(self, *args, **kwargs)
        mine = {self._base_class.__name__: self}
        result, reached = call_watched(self._base_class.forward, mine, self, *args, **kwargs)
        if not reached:
            raise TargetError(
                f"{self._base_class.__name__} does not read self.in_proj_weight, so its LoRA blocks would be skipped; "
                f"list it in exclude_modules"
            )
        return result


def _blank(base: type[nn.Module]) -> ProjectionAttention:
    """An uninitialised instance of a class that is both a `ProjectionAttention` and a `base`."""
    adapted = _adapted_class(base)  # type: ignore[arg-type]  # mypy: a class is hashable
    return adapted.__new__(adapted)


@functools.cache
def _adapted_class(base: type[nn.Module]) -> type[ProjectionAttention]:
    return type(f"SelectiveLoRA{base.__name__}", (ProjectionAttention, base), {})


def _rebuild(base: type[nn.Module], state: dict[str, Any]) -> ProjectionAttention:
    layer = _blank(base)
    layer.__setstate__(state)
    return layer


def _each(
    change: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply `change` to all three; those that are one tensor stay one, which decides how many products are needed."""
    q = change(query)
    k = q if key is query else change(key)
    return q, k, k if value is key else change(value)


def _softmax_scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Return `softmax(q @ k.T + mask)`, `[batch, heads, L, S]`, the mask added inside the product as the base does."""
    if mask is None:
        return torch.softmax(q @ k.transpose(-2, -1), dim=-1)
    mask = mask.expand(*q.shape[:-1], k.shape[-2]).flatten(0, 1)
    scores = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).transpose(-2, -1))
    return torch.softmax(scores.view(*q.shape[:2], *scores.shape[1:]), dim=-1)


def _additive(name: str, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask, True where masked, as one that is added to the scores; a floating one is that already."""
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise ShapeError(f"{name} has dtype {mask.dtype}; expected torch.bool or a floating dtype")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
