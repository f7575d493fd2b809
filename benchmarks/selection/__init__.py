"""Selection strategies compared on equal terms: what each reaches on a new task, and what it forgets.

task.py       what a task is: one training run of a configuration, and what is measured after it
registry.py   the tasks; demo.py: the shifts of `slora demo`
rows.py       the compared configurations; variants.py: ways to keep old knowledge, as settings
store.py      the runs on disk, a line each
engine.py     `python -m benchmarks selection`: runs what the store lacks; tuning.py: learning rates and penalties
verdicts.py   differences from scaled LoRA at equal retention, and the paragraph that the page makes of them
"""
