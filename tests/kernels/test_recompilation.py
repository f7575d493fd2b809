"""What a kernel is recompiled for: seen without a GPU in the keys under which Triton files what it compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

# Launches nothing: every launch is replaced by the key that Triton would look its compiled kernel up with. In a process
# of its own, because the tests of this folder import interpreted kernels.
RECORDER = """
import collections, json, sys
import torch
import triton.runtime.jit as jit
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

backend = make_backend(GPUTarget("cuda", 90, 32))
keys = set()
# By the key of a launch, which takes what was compiled for the same key before.
compiled_for = collections.defaultdict(set)

def record(self, *args, grid, warmup, **kwargs):
    kwargs.pop("debug", None)
    bind = jit.create_function_from_signature(self.signature, self.params, backend)
    _, specialization, options = bind(*args, **kwargs)
    keys.add(f"{self.__name__} {specialization} {sorted(options.items())}")
    compiled_for[launched[-1]].add(f"{specialization} {sorted(options.items())}")

jit.JITFunction.run = record
from slora.kernels import gate_probe, launch
from slora.ops.backends import Needs, triton
from slora.ops.operands import LoRAOperands

launched, call = [], launch.Launch.__call__

def noted(self, *args):
    launched.append(self.key)
    call(self, *args)

launch.Launch.__call__ = noted

# Without a GPU: descriptors are made, nothing runs.
triton.Triton.supports = lambda *_: True

def step(
    M=64, scaling=1.0, threshold=0.1, scores=(0.3, 0.0, 0.2), p=0.0, host_known=False, algorithm="fused", seed=1,
    K=384, n=320, r=16, bias=True, needs=(True, True, True, True), dtype="bfloat16", wide=False, offset=False,
):
    "The keys of one forward, backward and probe of a layer of as many blocks as there are scores."
    keys.clear()
    blocks = len(scores)
    x, dy = torch.zeros(M, K, dtype=torch.bfloat16), torch.zeros(M, blocks * n, dtype=torch.bfloat16)
    W, bias = torch.zeros(blocks * n, K, dtype=torch.bfloat16), torch.zeros(blocks * n) if bias else None
    A, B, gate = torch.zeros(blocks, r, K), torch.zeros(blocks, n, r), torch.tensor(scores)
    if wide:
        # Rows of a wider matrix.
        x, dy, W = (torch.cat([t, t[:, :8]], 1)[:, :-8] for t in (x, dy, W))
    x, dy, W, bias, A, B = (t if t is None else t.to(getattr(torch, dtype)) for t in (x, dy, W, bias, A, B))
    if offset:
        A, B, gate, bias = (torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (A, B, gate, bias))
    active = [i for i, score in enumerate(scores) if score >= threshold] if host_known else None
    operands = LoRAOperands(A, B, gate, threshold, scaling, active, p, torch.tensor(seed) if p else None)
    def choose(operation, pinned):
        algorithms = operation.algorithms()
        return next((f for f in algorithms if f.name == algorithm), algorithms[0])
    triton._algorithm = choose
    backend = triton.Triton()
    _, S = backend.forward(x, W, bias, operands)
    backend.backward(dy, x, S, W, operands, Needs(*needs))
    some = backend.sample_rows(x, 7, seed, None)
    backend.gate_probe(dy, some, operands, None, seed, None)
    return sorted(keys)

found = [step(**arguments) for arguments in json.loads(sys.argv[1])]
shared = {str(key): sorted(forms) for key, forms in compiled_for.items() if len(forms) > 1}
print(json.dumps([found, len(compiled_for), len(launched), shared]))
"""


FORMS = ("fused", "split", "precomputed")
MOVED: list[dict[str, Any]] = [
    *({"scaling": value} for value in (0.5, 2.0, 16.0)),
    {"threshold": 0.25},
    *({"scores": scores} for scores in ([0.0, 0.0, 0.0], [0.3, 0.3, 0.3], [0.0, 0.0, 0.3])),
    # Their products with the constant of the hash have 31 and 32 bits.
    *({"seed": seed} for seed in (2, 3, 4, 5)),
]
DROPOUT: list[dict[str, Any]] = [{"p": 0.1}, {"p": 0.2, "seed": 3}]
# With several blocks dx takes T from `skinny`, which has other tiles for many rows.
ROWS: list[dict[str, Any]] = [{"M": M, "scores": [0.3]} for M in (64, 48, 4096, 50, 51)]
KNOWN: list[dict[str, Any]] = [
    {"host_known": True, "scores": scores} for scores in ([0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0], [0, 0, 1])
]
# What else a layer may differ in.
LAYERS: list[dict[str, Any]] = [
    {"algorithm": algorithm, **change}
    for algorithm in FORMS
    for change in (
        {"K": 64}, {"K": 72}, {"n": 64}, {"n": 72}, {"r": 8}, {"r": 12}, {"r": 64}, {"r": 70}, {"r": 200},
        {"scores": [0.3], "K": 64, "n": 64}, {"scores": [0.3] * 20}, {"p": 0.1, "host_known": True},
        {"bias": False}, {"dtype": "float16"}, {"wide": True}, {"offset": True},
        *({"needs": [i != missing for i in range(4)]} for missing in range(4)),
    )
]  # fmt: skip
CALLS = [
    *({"algorithm": algorithm, **change} for algorithm in FORMS for change in ({}, *MOVED, *DROPOUT)),
    *ROWS,
    *KNOWN,
    *LAYERS,
]
KeysOf = Callable[..., list[list[str]]]


@pytest.fixture(scope="module")
def recorded() -> list[Any]:
    """What `RECORDER` prints for `CALLS`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", RECORDER, json.dumps(CALLS)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found: list[Any] = json.loads(run.stdout)
    return found


@pytest.fixture(scope="module")
def keys_of(recorded: list[Any]) -> KeysOf:
    """Return `keys_of(*calls)`: the keys of each call of `step` with one of the arguments in `CALLS`."""
    return lambda *calls: [recorded[0][CALLS.index(call)] for call in calls]


def test_launches_of_one_key_are_of_one_compiled_kernel(recorded: list[Any]) -> None:
    _, keys, launches, shared = recorded
    assert not shared
    assert 50 < keys < launches / 2


@pytest.mark.parametrize("algorithm", FORMS)
def test_no_scalar_no_seed_and_no_moving_gate_recompiles_a_kernel(algorithm: str, keys_of: KeysOf) -> None:
    first, *others = keys_of(*({"algorithm": algorithm, **change} for change in ({}, *MOVED)))
    # dx of several blocks is not fused.
    expected = {"skinny", "precomputed", "partial", "reduce", "copy", "probe"}
    expected |= {"fused"} if algorithm != "precomputed" else set()
    assert {key.partition("_")[0].split()[0] for key in first} == expected
    for change, keys in zip(MOVED, others, strict=True):
        assert keys == first, change
    some, other = keys_of(*({"algorithm": algorithm, **change} for change in DROPOUT))
    assert some == other
    assert some != first


def test_the_number_of_rows_counts_only_as_a_multiple_of_16(keys_of: KeysOf) -> None:
    whole, *others, ragged, odd = keys_of(*ROWS)
    for keys in others:
        assert keys == whole
    assert ragged == odd


def test_split_compiles_nothing_that_fused_and_precomputed_do_not(keys_of: KeysOf) -> None:
    fused, split, precomputed = (set(keys) for keys in keys_of(*({"algorithm": algorithm} for algorithm in FORMS)))
    assert split <= fused | precomputed


def test_which_blocks_are_active_does_not_count_where_the_host_knows_them(keys_of: KeysOf) -> None:
    first, *others, one, other_one = keys_of(*KNOWN)
    for keys in others:
        assert keys == first
    assert one == other_one
