"""Triton kernels of slora, imported as `slora.kernels`. `slora.ops.backends.triton` launches them.

| file | what it computes |
|---|---|
| `linear.py` | y or dx: base product and low-rank update, S or T made in the same pass or read |
| `cast.py` | A and B in the dtype of x |
| `skinny.py` | S and T alone |
| `weight_gradients.py` | dA, dB and the gates' gradients in one pass over x and dy |
| `gate_probe.py` | gradients of inactive gates from a random subset of rows |
| `tiles.py`, `packed.py`, `dropout.py` | on the device: tiles of a matrix, packed block indices, kept elements |
| `configs.py` | tile sizes |
| `launch.py` | what every launcher asks of the device |

They serve bf16 and fp16; fp32 in the interpreter alone, where tests see how exact they are. x, dy and W have rows of
16 aligned bytes, K and the outputs of a block are multiples of 8, the rank is a multiple of 8 up to 256.

Importing this package does not import Triton; importing one of its files does.
"""
