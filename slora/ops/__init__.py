"""The operator behind every adapted layer, from its arguments to the code that computes it.

    layers -> operator.apply -> a backend -> PyTorch calls or kernels

operands.py          `LoRAOperands`: the blocks of a layer in one record
operator.py          values and gradients: an autograd function in eager mode, a torch.library operator elsewhere
gate_probe.py        the gradient of inactive gates
checks.py            checks of the arguments
dispatch.py          which backend computes a call
backends/            `eager`: PyTorch calls; `triton`: kernels and cuBLAS, the fastest algorithm by measurement
layout.py            views of rows, blocks and columns
dropout.py           the dropout mask, a function of a counter
flops.py             FLOP counts
"""

from slora.ops.gate_probe import ProbeGates
from slora.ops.operands import LoRAOperands
from slora.ops.operator import apply, apply_reference, needs_reference, selective_linear

__all__ = ["LoRAOperands", "ProbeGates", "apply", "apply_reference", "needs_reference", "selective_linear"]
