"""What is compared: ways to compute one adapted layer (`layer.py`) and ways to train or run a model (`model.py`)."""
