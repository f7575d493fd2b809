"""Triton kernels of slora, imported as `slora.kernels`. `slora.forms` launches them.

| file | what it computes |
|---|---|
| `linear_forward.py` | y: base product, S and the low-rank update in one pass over x |
| `linear_backward.py` | dx: base product, T and the low-rank update in one pass over dy |
| `weight_gradients.py` | dA, dB and the gates' gradients in one pass over x and dy |
| `gate_probe.py` | gradients of inactive gates from a random subset of rows |
| `skinny.py` | S or T alone, for the forms that read them |
| `tiles.py`, `slots.py`, `dropout.py` | on the device: tiles of a matrix, places of blocks, kept elements |
| `configs.py`, `narrow_configs.py` | tile sizes of the GEMM kernels, and of the others |
| `launch.py` | what every launcher asks of the device |

Importing this package does not import Triton; importing one of its files does.
"""
