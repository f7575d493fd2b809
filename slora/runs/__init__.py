"""The directory of a run: its settings, metrics, checkpoints and results, read without torch.

settings.py            every setting of a run; flags.py: as flags of the command line; request.py: checked
rundir.py              its files, who writes into it, how to go on with it
recorder.py            metrics.jsonl, TensorBoard, the progress bar
checkpoint_folders.py  which checkpoints there are; checkpoint_state.py: their JSON
outcome.py             why a run ended with no block active, or with all
"""
