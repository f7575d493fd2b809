"""Triton kernels of slora, imported as `slora.kernels`. None is written yet; `slora.addmm` serves every device.

Each will be one file and one idea: `linear_forward` (base product, S and the low-rank update in one pass),
`linear_backward` (dx with T in the same loop, then dA, dB and the gate gradients), `gate_probe` (gate gradients of
inactive blocks from a random subset of rows) and `configs` (the one table of tile sizes). Importing this package
must not import Triton.
"""
