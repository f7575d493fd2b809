"""Triton kernels of slora, imported as `slora.kernels`.

One file per idea: `linear_forward` (base product, S and the low-rank update in one pass), `linear_backward`
(dx with T in the same loop, then dA, dB and the gate gradients), `gate_probe` (gate gradients of inactive
blocks from a random subset of rows) and `configs` (the one table of tile sizes). Importing this package does
not import Triton.
"""
