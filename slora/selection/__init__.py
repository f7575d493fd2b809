"""Selection: strategies that choose which blocks stay, one file each, behind one interface.

strategy.py     the interface: phases of a run, `step`, `finish`, state; at most one strategy per model
budgeted.py     what strategies with a budget share; allocation.py: what blocks cost and which fit
gates.py        `Gates`: the paper's scores, threshold and penalty
budget.py       `Budget`: blocks are ranked and switched off during the run
one_shot.py     strategies that choose before the first step
sensitivity.py  `Sensitivity`: by squared gradients of the base weights
fixed.py        `First`, `Last`, `Random`, `All`: controls
ranks.py        what strategies share that choose single ranks of blocks: sora.py  codyra.py  adalora.py  increlora.py;
                importance.py: smoothed sensitivities
keep.py         `keep_blocks`: chooses at once in a trained model
ranking.py      how `Budget` and `keep_blocks` rank blocks: the norm of the update; solo_gain.py: the loss reduction
"""

from slora.selection.adalora import AdaLoRA
from slora.selection.budget import Budget
from slora.selection.codyra import CoDyRA
from slora.selection.fixed import All, First, Last, Random
from slora.selection.gates import Gates
from slora.selection.increlora import IncreLoRA
from slora.selection.keep import keep_blocks
from slora.selection.ranking import Ranking, update_norm
from slora.selection.ranks import RankStrategy
from slora.selection.sensitivity import Sensitivity
from slora.selection.solo_gain import SoloGain
from slora.selection.sora import SoRA
from slora.selection.strategy import Strategy, freeze_gates

__all__ = [
    "AdaLoRA",
    "All",
    "Budget",
    "CoDyRA",
    "First",
    "Gates",
    "IncreLoRA",
    "Last",
    "Random",
    "RankStrategy",
    "Ranking",
    "Sensitivity",
    "SoRA",
    "SoloGain",
    "Strategy",
    "freeze_gates",
    "keep_blocks",
    "update_norm",
]
