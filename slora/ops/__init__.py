"""The operator behind every adapted layer, from its arguments to the code that computes it.

    layers -> operator.apply -> a backend -> PyTorch calls or kernels

operands.py          `LoRAOperands`: what the blocks of a layer are, in one record
operator.py          values and gradients: an autograd function in eager mode, a torch.library operator elsewhere
gate_probe.py        what inactive gates learn from
checks.py            what is accepted, and the words of what is not
dispatch.py          which backend serves
backends/            `eager`, in PyTorch calls, and `triton`, in kernels, whose form a measurement chooses
layout.py            rows, blocks and columns, for both
dropout.py           the mask, drawn from a counter
flops.py             what it all computes
"""

from slora.ops.gate_probe import ProbeGates
from slora.ops.operands import LoRAOperands
from slora.ops.operator import apply, plain, selective_linear, wants_plain

__all__ = ["LoRAOperands", "ProbeGates", "apply", "plain", "selective_linear", "wants_plain"]
