"""A run before and after training: its settings and flags, and the files of its directory.

settings.py            all settings of a run; conversion.py: from YAML and flags
strategies.py          which budget and settings each strategy takes
flags.py               the settings as flags of `slora finetune`; request.py: its arguments, checked
check_retention.py      what settings that keep old knowledge need
heads.py               which settings a linear and a zero-shot head take
rundir.py              the files of a run directory; lock.py: one run at a time writes into it
checkpoint_folders.py  which checkpoints there are; checkpoint_state.py: their `state.json`
eval_table.py          the table of an evaluation: rows, means, forgetting
read_results.py        the results in it; next_command.py: how to resume or restart it
recorder.py            writes metrics.jsonl, TensorBoard and progress_bar.py; metrics.py: reads metrics.jsonl
explain_blocks.py      why a run ended with no block active, or with all
"""
