"""Reports: one HTML page per run, with its figures inside.

run_evaluation.py  the part of it about `slora evaluate`
page.py   the page of a `slora finetune` run; the page of the demo is `slora.demo.page`
evaluation.py  the part of it about `slora evaluate`
page.py       text, tables and figures as one HTML file; page.html.j2 is its template
style.py      colours, markers and sizes of all figures
charts.py     curves, bars, accuracy on the new task against accuracy left on the old one
cells.py      the row and column of each block in a figure; block_map.py: which blocks are active
gates.py      the gates over the steps; sweep.py: target against
              retention over the scale of a merge; drift.py: how far each block moves the model
"""

from slora.report.run_page import write_report

__all__ = ["write_report"]
