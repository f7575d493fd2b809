"""Dropout inside a kernel: the numbers of `slora.ops.dropout`, cheaply."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from slora.kernels import dropout
from slora.ops import dropout as statement


@triton.jit
def draw(seed, out, M, K, drop, BM: tl.constexpr, BK: tl.constexpr):
    key0, key1, key2 = dropout.keys(tl.load(seed))
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * BK
    a, b = dropout.row_keys(key0, key1, rows)
    kept = dropout.keep(a, b, key2, first, drop, BK)
    columns = first + tl.arange(0, BK)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    tl.store(out + rows[:, None].to(tl.int64) * K + columns[None, :], kept.to(tl.float32), mask=inside)


SIZES, SEEDS, PROBABILITIES = [(1, 1), (37, 51), (70, 128)], [0, 5, -7, 2**62 - 1, 2**40 + 3], [0.1, 0.5, 0.99]


@pytest.mark.parametrize(
    ("M", "K", "seed", "p"),
    [(*size, seed, PROBABILITIES[(i + j) % 3]) for i, size in enumerate(SIZES) for j, seed in enumerate(SEEDS)],
)
def test_a_kernel_draws_the_stated_mask(M: int, K: int, seed: int, p: float, device: torch.device) -> None:
    out = torch.full((M, K), float("nan"), device=device)
    seeds = torch.tensor(seed, device=device)
    draw[(triton.cdiv(M, 16), triton.cdiv(K, 32))](seeds, out, M, K, statement.drop_units(p), 16, 32)
    assert torch.equal(out, statement.keep_mask(M, K, p, seeds, torch.float32))


COMPILED = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from slora.kernels import dropout

@triton.jit
def masked(x, y, seed, first, drop, BM: tl.constexpr, BK: tl.constexpr):
    key0, key1, key2 = dropout.keys(tl.load(seed))
    rows = tl.arange(0, BM)
    a, b = dropout.row_keys(key0, key1, rows)
    at = rows[:, None] * BK + tl.arange(0, BK)[None, :]
    kept = dropout.keep(a, b, key2, first, drop, BK)
    tl.store(y + at, tl.where(kept, tl.load(x + at), 0.0))

types = {"x": "*bf16", "y": "*bf16", "seed": "*i64", "first": "i32", "drop": "i32"}
aligned = {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]}
for arch in (80, 90, 100):
    source = ASTSource(masked, types | {"BM": "constexpr", "BK": "constexpr"}, {"BM": 128, "BK": 64}, aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 8}).asm["ptx"]
    print(arch, ptx.count("mul.lo.s32"))
"""


def test_two_neighbouring_columns_share_one_hash_in_compiled_code(tmp_path: Path) -> None:
    # 128 x 64 elements over 256 threads, eight neighbours each: 32 elements are 16 hashes of two multiplications, and
    # a third is LLVM's for the shift. With them come the keys, two multiplications each: 2 of each of 4 rows, 4 of
    # pairs of columns, 5 of the seed. Code that hashed every element would multiply 64 times for the elements alone.
    script = tmp_path / "masked.py"
    script.write_text(COMPILED)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = dict(line.split() for line in run.stdout.splitlines())
    assert set(found) == {"80", "90", "100"}
    for arch, multiplications in found.items():
        assert int(multiplications) <= 3 * 16 + 2 * (8 + 4 + 5), f"sm_{arch}: {multiplications} multiplications"
