"""`SelectiveLoRALinear`: `nn.Linear` with gated LoRA blocks. The computation is `Projection.project` (`forward.py`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from slora.config import SelectiveLoRAConfig
from slora.errors import StateError
from slora.gates.cache import GateCache
from slora.layers.base import LoRABlocks
from slora.layers.fx import record_call
from slora.module_tree.sharded import full


class SelectiveLoRALinear(LoRABlocks, nn.Linear):
    """A linear layer `[..., in] -> [..., out]` with `blocks` gated LoRA blocks of `out / blocks` outputs each.

    `weight [out, in]` and `bias [out]` keep their names and are frozen. Trainable are `lora_A [blocks, r, in]`,
    `lora_B [blocks, out / blocks, r]` and `gate [blocks]`, in fp32. While no block is active the layer is
    exactly `F.linear`.

    Args:
        in_features: size of each input row.
        out_features: size of each output row.
        bias: whether the base has a bias.
        r: rank.
        lora_alpha: numerator of the scaling `lora_alpha / r`.
        blocks: number of blocks; divides `out_features`.
        device: device of all parameters.
        dtype: dtype of the base parameters.
        config: further fields of `SelectiveLoRAConfig` by name: `lora_dropout`, `threshold`, `inactive`, ...

    Raises:
        ConfigError: a value is out of range or does not fit the shape.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 16,
        lora_alpha: float = 16,
        blocks: int = 1,
        device: Any = None,
        dtype: Any = None,
        **config: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._base_class = nn.Linear
        settings = SelectiveLoRAConfig(r=r, lora_alpha=lora_alpha, blocks=blocks, **config)
        self._add_blocks(settings, self.choose_blocks(settings, self, ""), "", None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: SelectiveLoRAConfig,
        *,
        name: str = "",
        gate_cache: GateCache | None = None,
    ) -> SelectiveLoRALinear:
        """Return an adapted layer that shares the parameters, hooks and mode of `linear`.

        `name` selects the entries of `rank_pattern` and `alpha_pattern` and stands in errors; `gate_cache` is
        shared between the layers of a model. With `blocks="auto"` the layer gets one block, or three where the
        last component of `name` is `qkv` and `out_features == 3 * in_features`.
        """
        blocks = cls.choose_blocks(config, linear, name)
        layer = cls.__new__(cls)
        layer._adopt(linear)
        layer._add_blocks(config, blocks, name, gate_cache)
        return layer

    @classmethod
    def _automatic_blocks(cls, module: nn.Module, name: str) -> int:
        out_features, in_features = module.weight.shape  # type: ignore[misc]
        return 3 if name.rsplit(".", 1)[-1] == "qkv" and out_features == 3 * in_features else 1

    def reset_parameters(self) -> None:
        """See `LoRABlocks.reset_parameters`. The constructor of `nn.Linear` calls this before there are blocks."""
        if "gate" in self._parameters:
            LoRABlocks.reset_parameters(self)
        else:
            nn.Linear.reset_parameters(self)

    def forward(self, input: Tensor) -> Tensor:
        """Return `[..., out]` for `input [..., in]`."""
        if isinstance(input, Proxy):
            return record_call(self, input)  # type: ignore[no-any-return]
        return self.project(input)

    def fuse(self) -> nn.Linear:
        """Return a plain `nn.Linear` with the active blocks folded in; the layer itself is unchanged."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.weight.dtype
        )
        weight = self.merged_weight()
        if not weight.isfinite().all():
            raise StateError(
                f"the merged weight of {self} holds values that are not finite in {weight.dtype}: one of its matrices "
                f"does, or the sum overflows"
            )
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(full(self.bias.detach()).clone(), requires_grad=False)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, {self._describe()}"
