"""What the proof on a GPU (`benchmarks/gpu.py`) is made of."""
