"""Selection: strategies that decide which blocks stay, one file each behind one interface.

strategy.py   the interface: phases of a run, `start`, `step`, `finish`, state; one strategy to a model
budget.py     `Budget`: exactly as many blocks as asked for; `keep_blocks` does it at once
gates.py      `Gates`: the paper's scores, threshold and penalty
ranking.py    what blocks are ranked by: the norm of their update, or what each gains by itself
"""

from slora.selection.budget import Budget, keep_blocks
from slora.selection.gates import Gates
from slora.selection.ranking import Ranking, SoloGain, update_norm
from slora.selection.strategy import Strategy, freeze_gates

__all__ = ["Budget", "Gates", "Ranking", "SoloGain", "Strategy", "freeze_gates", "keep_blocks", "update_norm"]
