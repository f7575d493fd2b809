"""What is compared: ways to compute one adapted layer (`layer.py`), to train or run a model (`model.py`), to merge one.

`step.py` has a training step of a model, `exact.py` the truth that it is held to, `memory.py` the peak of a process.
"""
