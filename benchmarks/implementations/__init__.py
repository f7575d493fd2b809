"""What is compared: ways to compute one adapted layer (`layer.py`), and to train a whole model (`training.py`)."""
