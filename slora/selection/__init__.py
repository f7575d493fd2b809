"""Selection: strategies that choose which blocks stay, one file each, behind one interface.

strategy.py   the interface: phases of a run, `step`, `finish`, state; at most one strategy per model
budget.py     `Budget`: a given number of blocks; allocation.py: what blocks cost and which fit
gates.py      `Gates`: the paper's scores, threshold and penalty
keep.py       `keep_blocks`: chooses at once in a trained model
ranking.py    how `Budget` and `keep_blocks` rank blocks: the norm of the update; solo_gain.py: the loss reduction
"""

from slora.selection.budget import Budget
from slora.selection.gates import Gates
from slora.selection.keep import keep_blocks
from slora.selection.ranking import Ranking, update_norm
from slora.selection.solo_gain import SoloGain
from slora.selection.strategy import Strategy, freeze_gates

__all__ = ["Budget", "Gates", "Ranking", "SoloGain", "Strategy", "freeze_gates", "keep_blocks", "update_norm"]
