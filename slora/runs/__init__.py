"""The directory of a run: its settings, metrics, checkpoints and results.

settings.py            all settings of a run; conversion.py: from YAML and flags
flags.py               the settings as flags of `slora finetune`; request.py: its arguments, checked
rundir.py              the files of a run directory; lock.py: one run at a time writes into it
checkpoint_folders.py  which checkpoints there are; checkpoint_state.py: their `state.json`
results.py             the results in it; next_command.py: how to resume or restart it
recorder.py            writes metrics.jsonl, TensorBoard and progress_bar.py; metrics.py: reads metrics.jsonl
outcome.py             why a run ended with no block active, or with all
"""
