"""FLOPs: of the operator by formula, of any call by PyTorch's counter.

`register` adds the formulas to PyTorch's counter, so that `torch.utils.flop_counter.FlopCounterMode` counts what a step
really computes: the active blocks only, and no backward below the first of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch


def linear_flops(M: int, N: int, K: int) -> int:
    """FLOPs of `[M, K] @ [K, N]`, a multiplication and an addition counted as two."""
    return 2 * M * N * K


def forward_flops(M: int, N: int, K: int, r: int, blocks: int, active: int) -> int:
    """FLOPs of the forward: the base product, and `S` and its update for `active` of `blocks` blocks."""
    return linear_flops(M, N, K) + active * (linear_flops(M, r, K) + linear_flops(M, N // blocks, r))


def backward_flops(M: int, N: int, K: int, r: int, blocks: int, active: int, needs: Sequence[bool]) -> int:
    """FLOPs of the backward for the gradients that `needs = (dx, dA, dB, dgate)` asks for."""
    need_dx, need_dA, need_dB, need_dgate = needs
    narrow, wide = linear_flops(M, N // blocks, r), linear_flops(M, r, K)
    per_block = narrow * (need_dx or need_dA) + wide * need_dx + wide * need_dA + narrow * (need_dB or need_dgate)
    return linear_flops(M, N, K) * need_dx + active * per_block


def probe_flops(m: int, N: int, K: int, r: int, blocks: int, probed: int) -> int:
    """FLOPs of the probe of `probed` of `blocks` gates from `m` rows: S and T of each."""
    return probed * (linear_flops(m, r, K) + linear_flops(m, N // blocks, r))


def count_flops(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Run `call(*args, **kwargs)` once and return the FLOPs of its matrix products, backward included if run."""
    from torch.utils.flop_counter import FlopCounterMode

    register()
    with FlopCounterMode(display=False) as counter:
        call(*args, **kwargs)
    return int(counter.get_total_flops())


@functools.cache
def register() -> None:
    """Add the formulas to PyTorch's counter. Adapted layers call this when they are made.

    Not done at import, because the counter's module imports Triton, which takes longer than all of slora.
    """
    from torch.utils.flop_counter import (
        flop_registry,
        register_flop_formula,
        sdpa_backward_flop_count,
        sdpa_flop_count,
    )

    # A formula gets the shape of each tensor in place of the tensor.
    @register_flop_formula(torch.ops.slora.selective_linear)
    def forward(x: Any, weight: Any, bias: Any, *blocks: Any, out_shape: Any = None) -> int:
        number, r, K, count = _of_blocks(blocks)
        return forward_flops(math.prod(x[:-1]), weight[0], K, r, number, count)

    @register_flop_formula(torch.ops.slora.selective_linear_backward)
    def backward(dy: Any, x: Any, S: Any, weight: Any, needs: Sequence[bool], *blocks: Any, **kwargs: Any) -> int:
        number, r, K, count = _of_blocks(blocks)
        return backward_flops(math.prod(dy[:-1]), weight[0], K, r, number, count, needs)

    @register_flop_formula(torch.ops.slora.gate_probe)
    def probe(
        dy: Any, x: Any, lora_A: Any, lora_B: Any, gate: Any, threshold: float, scaling: float,
        present: Sequence[int] | None, *args: Any, **kwargs: Any,
    ) -> int:  # fmt: skip
        blocks, r, K = lora_A
        return probe_flops(x[0], lora_B[1] * blocks, K, r, blocks, blocks if present is None else len(present))

    # PyTorch has no formula for the in-place addmm.
    if torch.ops.aten.addmm_ not in flop_registry:

        @register_flop_formula(torch.ops.aten.addmm_)
        def addmm_(y: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
            return linear_flops(a[0], b[1], a[1])

    # PyTorch counts attention on GPUs only; on the CPU a vision transformer's would be missing from every figure.
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if on_cpu not in flop_registry:

        @register_flop_formula(on_cpu)
        def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
            return int(sdpa_flop_count(query, key, value))

        @register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
        def attention_backward(dy: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
            return int(sdpa_backward_flop_count(dy, query, key, value))

    for operator, formula in list(flop_registry.items()):
        if "_scaled_dot_product" in str(operator):
            flop_registry[operator] = _with_shared_heads(formula, "backward" in str(operator))


def _of_blocks(fields: Sequence[Any]) -> tuple[int, int, int, int]:
    """Return `(blocks, r, K, computed blocks)` of the fields of `LoRAOperands`."""
    (blocks, r, K), active = fields[0], fields[5] if len(fields) > 5 else None
    return blocks, r, K, blocks if active is None else len(active)


def _with_shared_heads(formula: Callable[..., Any], backward: bool) -> Callable[..., Any]:
    """`formula` for `(query, key, value, ...)`, or `(dy, query, key, value, ...)`, each of `[batch, heads, ...]`.

    PyTorch's formulas refuse keys with fewer heads than queries, as Llama has them; each of those serves several.
    """

    def counted(*args: Any, **kwargs: Any) -> Any:
        heads = args[backward].shape[1]
        shapes = (torch.Size((t.shape[0], heads, *t.shape[2:])) for t in args[backward : 3 + backward])
        return formula(*args[:backward], *shapes, *args[3 + backward :], **kwargs)

    return counted
