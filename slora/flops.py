"""FLOPs: of an adapted layer by formula, of any call by counting.

The formulas of the operator stand in `slora.ops` beside it and are registered with PyTorch's own counter, so
`count_flops` sees what a step really computes: the active blocks, and nothing below the first of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from slora.layers import LoRABlocks
from slora.ops import forward_flops, linear_flops


def layer_flops(layer: LoRABlocks, rows: int = 1) -> tuple[int, int]:
    """Return `(base, added)`: forward FLOPs of the base layer and of its active blocks for `rows` input rows."""
    N, K = layer.base_weight.shape
    base = linear_flops(rows, N, K)
    active = 0 if layer.merged or not layer.enabled else len(layer.activity().active)
    return base, forward_flops(rows, N, K, layer.r, layer.blocks, active) - base


def count_flops(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Run `call(*args, **kwargs)` once and return the FLOPs of its matrix products, backward included if run."""
    with FlopCounterMode(display=False) as counter:
        call(*args, **kwargs)
    return int(counter.get_total_flops())
