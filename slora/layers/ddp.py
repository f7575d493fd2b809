"""What `DistributedDataParallel` expects of the blocks: in every backward a gradient of each parameter that it holds.

DDP waits for all of them, also for those of inactive blocks, and for gates whose `requires_grad` was switched off since
it was made. With `find_unused_parameters=True`, parameters that are not in the graph of the output count as unused, and
DDP fails if one of them gets a gradient all the same, as a gate does from `slora.gate_penalty`.

So inside the forward of a DDP these parameters are made inputs of the graph, with an undefined gradient: autograd calls
the hook of DDP for them and allocates nothing; DDP sums zeros in the buckets that it has anyway.

Parameters in the graph make the backward go down to their layer, also below the first active block. Therefore only
gates that a penalty in the loss may reach are added with `find_unused_parameters=True`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from slora.gates.gated import Gated


def with_expected_parameters(layer: Gated, x: Tensor, active: bool) -> Tensor:
    """Return `x` with those parameters of `layer` in its graph that DDP waits for and that would get no gradient.

    Outside the forward of a DDP, and its recomputation by activation checkpointing, that is `x` itself.

    Args:
        active: whether a block of the layer is active: then A, B and trainable gates are in the graph already.
    """
    ddp: Any = DistributedDataParallel._active_ddp_module
    cache = layer.gate_cache
    if ddp is not None:
        cache.set_ddp(ddp)
    elif cache.ddp is None:
        return x
    else:
        ddp = cache.ddp()
    if ddp is None or not torch.is_grad_enabled():
        return x
    parameters = [layer.lora_A, layer.lora_B, layer.gate]
    if layer.rank_gate is not None:
        parameters.append(layer.rank_gate)
    if ddp.find_unused_parameters and not ddp.static_graph:
        wanted = [layer.gate] if cache.penalised and layer.gate.requires_grad and not active else []
    else:
        wanted = [parameter for parameter in parameters if not (active and parameter.requires_grad)]
        cache.without_gradient |= dict.fromkeys(p for p in wanted if p is not layer.gate or not p.requires_grad)
    if not wanted:
        return x
    held = [parameter for parameter in wanted if not parameter.requires_grad]
    for parameter in held:
        # DDP still waits for what required a gradient when it was made.
        parameter.requires_grad_()
    # Attached to the input, not to the output: that may be changed in place afterwards, which a view does not allow.
    result: Tensor = _InGraph.apply(x, *wanted)  # type: ignore[no-untyped-call]
    for parameter in held:
        parameter.requires_grad_(False)
    return result


class _InGraph(torch.autograd.Function):
    """The identity on the first argument; the gradients of the others are undefined."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.others = len(parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads[0], *(None,) * ctx.others
