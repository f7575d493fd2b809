"""What a kernel is compiled for anew: seen without a GPU in the keys under which Triton files what it compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

# Launches nothing: every launch is replaced by the key that Triton would look its compiled kernel up with. In a process
# of its own, because the tests of this folder import interpreted kernels.
RECORDER = """
import json, sys
import torch
import triton.runtime.jit as jit
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

backend = make_backend(GPUTarget("cuda", 90, 32))
keys = set()

def record(self, *args, grid, warmup, **kwargs):
    kwargs.pop("debug", None)
    bind = jit.create_function_from_signature(self.signature, self.params, backend)
    _, specialization, options = bind(*args, **kwargs)
    keys.add(f"{self.__name__} {specialization} {sorted(options.items())}")

jit.JITFunction.run = record
from slora import forms
from slora.kernels import gate_probe

def step(M=64, scaling=1.0, threshold=0.1, scores=(0.3, 0.0, 0.2), p=0.0, listed=False, form="fused", seed=1):
    "The keys of one forward, backward and probe of a layer of three blocks."
    keys.clear()
    K, n, r = 96, 64, 16
    x, dy = torch.zeros(M, K, dtype=torch.bfloat16), torch.zeros(M, 3 * n, dtype=torch.bfloat16)
    W, bias = torch.zeros(3 * n, K, dtype=torch.bfloat16), torch.zeros(3 * n, dtype=torch.bfloat16)
    A, B, gate = torch.zeros(3, r, K), torch.zeros(3, n, r), torch.tensor(scores)
    active = [i for i, score in enumerate(scores) if score >= threshold] if listed else None
    masks = torch.tensor(seed) if p else None
    def run(shape, rows, candidates, compute):
        chosen = candidates()
        return compute(next((c for c in chosen if c.name == form), chosen[0]))
    forms._run = run
    # Each form is asked for here, whether or not it would be a candidate.
    forms._vendor_serves = lambda *_: True
    _, S = forms.forward(x, W, bias, A, B, gate, threshold, scaling, active, p, masks)
    forms.backward(dy, x, W, A, B, gate, S, threshold, scaling, active, p, masks, [True] * 4)
    some = gate_probe.sample_rows(x, 7, seed)
    gate_probe.gate_probe([gate_probe.Layer(dy, some, A, B, gate, threshold, scaling, seed)])
    return sorted(keys)

print(json.dumps([step(**arguments) for arguments in json.loads(sys.argv[1])]))
"""


def keys_of(*calls: dict[str, Any]) -> list[list[str]]:
    """The keys of each call of `step`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", RECORDER, json.dumps(calls)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found: list[list[str]] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize("form", ["fused", "accumulate", "addmm"])
def test_no_scalar_no_seed_and_no_moving_gate_compiles_a_kernel_anew(form: str) -> None:
    moved: list[dict[str, Any]] = [
        *({"scaling": value} for value in (0.5, 2.0, 16.0)),
        {"threshold": 0.25},
        *({"scores": scores} for scores in ([0.0, 0.0, 0.0], [0.3, 0.3, 0.3], [0.0, 0.0, 0.3])),
        # Their products with the constant of the hash have 31 and 32 bits.
        *({"seed": seed} for seed in (2, 3, 4, 5)),
    ]
    first, *others = keys_of(*({"form": form, **change} for change in ({}, *moved)))
    assert any(key.startswith("linear_forward" if form != "addmm" else "_S") for key in first)
    assert any(key.startswith("_probe") for key in first)
    for change, keys in zip(moved, others, strict=True):
        assert keys == first, change
    some, other = keys_of({"form": form, "p": 0.1}, {"form": form, "p": 0.2, "seed": 3})
    assert some == other
    assert some != first


def test_the_number_of_rows_counts_only_as_a_multiple_of_16() -> None:
    whole, *others, ragged, odd = keys_of(*({"M": M} for M in (64, 48, 4096, 50, 51)))
    for keys in others:
        assert keys == whole
    assert ragged == odd


def test_which_blocks_are_active_does_not_count_where_the_host_lists_them() -> None:
    first, *others, one, other_one = keys_of(
        *({"listed": True, "scores": s} for s in ([0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0], [0, 0, 1]))
    )
    for keys in others:
        assert keys == first
    assert one == other_one
