"""Gates: which blocks are active, the penalty on them, and what may move them.

gated.py            a layer with gates: which of its blocks are active
cache.py            the same for all layers of a model, read from the device again when a gate has changed
values.py           the gates of a model: parameters and values
penalty.py          mean |gate|, and its warm-up
proximal.py         the gates' own optimizer
optimizer_rules.py  which optimizers of torch and timm move gates so that blocks can be selected
release.py          freeing the matrices of blocks that are off for good

The gradient of a gate, straight-through, comes of the operator: `slora.reference` defines it.
"""

from slora.gates.penalty import gate_penalty, penalty_at
from slora.gates.proximal import ProximalGates
from slora.gates.release import release_frozen
from slora.gates.values import gate_values, gates, set_gates

__all__ = ["ProximalGates", "gate_penalty", "gate_values", "gates", "penalty_at", "release_frozen", "set_gates"]
