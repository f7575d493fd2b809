"""Adapted layers: LoRA blocks with gates on the weights of linear layers and of attention.

base.py            `LoRABlocks`: the parameters of the blocks, from their making to merging and release
forward.py         the forward of an adapted layer: base product and active blocks
ranks.py           rank gates: a factor for each rank of each block, and the removal of ranks
state.py           casts, copies, state dicts
linear.py          `nn.Linear` with blocks
attention.py       attention with an `in_proj_weight`
weight_reads.py    modules that read the weight of a layer instead of calling it; bytecode.py finds them
ddp.py             what `DistributedDataParallel` expects of the parameters of inactive blocks
fx.py              `torch.fx.symbolic_trace`
optimizer_hook.py  what is checked before an optimizer steps
"""

from slora.layers.attention import ProjectionAttention, SelectiveLoRAAttention
from slora.layers.base import LoRABlocks, adapted_layers
from slora.layers.forward import gates_on_device
from slora.layers.linear import SelectiveLoRALinear

__all__ = [
    "LoRABlocks",
    "ProjectionAttention",
    "SelectiveLoRAAttention",
    "SelectiveLoRALinear",
    "adapted_layers",
    "gates_on_device",
]
