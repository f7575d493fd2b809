"""Gates: which blocks are active, the penalty on them, and what may move them.

cache.py            which blocks are active, as the host knows it, read again when a gate has moved
values.py           the gates of a model: parameters and values
penalty.py          mean |gate|, and its warm-up
proximal.py         the gates' own optimizer
optimizer_rules.py  which optimizers of torch and timm move gates so that blocks can be selected
optimizer_hook.py   the warning where another one is about to
release.py          freeing the matrices of blocks that are off for good
"""

from slora.gates import optimizer_hook as _optimizer_hook  # noqa: F401 (registers itself)
from slora.gates.penalty import gate_penalty, penalty_at
from slora.gates.proximal import ProximalGates
from slora.gates.release import release_frozen
from slora.gates.values import gate_values, gates, set_gates

__all__ = ["ProximalGates", "gate_penalty", "gate_values", "gates", "penalty_at", "release_frozen", "set_gates"]
