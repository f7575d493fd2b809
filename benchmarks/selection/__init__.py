"""Selection, and ways of keeping old knowledge, compared: what each reaches on a new task, and what it forgets.

task.py       what a task is: one training run of a configuration, and what is measured after it
demo.py       the shifts of `slora demo`; glyph.py: its CLIP; minilm.py: the MiniLM of `examples/`
rows.py       the compared strategies; retention.py: the compared ways of keeping old knowledge
registry.py   tables and tasks by name
store.py      the runs on disk, a line each
engine.py     runs what the store lacks; tuning.py: learning rates and weights; command.py: the command line
lines.py      what a table says of a row, such as its difference from scaled LoRA at equal retention
verdicts.py   what wins where, by a rule
"""
