"""What keeps old knowledge, compared on the demo with plain LoRA scaled after training.

A method of the demo (`BASES`) runs with each of `VARIANTS`. The weight of a variant is chosen among at most three on
validation images, with a seed that the results do not use; the results are on test images. Ranks, learning rates and
schedules are the demo's; `python -m benchmarks selection` has the same variants at its own.

variants.py   the variants, their weights, the shifts and seeds
run.py        one training run; runs.py: the stored ones
table.py      the table from the stored runs, and what it says
command.py    `python -m benchmarks retention`: runs what is missing; `python -m benchmarks report` makes the page
"""

from benchmarks.retention.variants import VARIANTS

__all__ = ["VARIANTS"]
