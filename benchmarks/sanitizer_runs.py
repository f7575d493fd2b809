"""The kernels by themselves: `python -m benchmarks.sanitizer_runs all|profile`, for compute-sanitizer and the profiler.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.sanitizer_runs all

all       the batched merge over ragged weights, and layers forward and backward over odd shapes
profile   one large layer and one large merge, of which the profiler sees the second time alone
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch

import slora
from benchmarks.implementations.layer import IMPLEMENTATIONS, Problem, Shape
from benchmarks.roofline import DTYPES
from benchmarks.timing import Call, ieee_fp32

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def layer(shape: Shape) -> Call:
    """Forward and backward of the kernels."""
    problem = Problem(shape, DEVICE, sets=1)
    return partial(IMPLEMENTATIONS["slora, triton"](problem).trained, problem.xs[0], problem.dys[0])


def merge(dtype: str, *sizes: tuple[int, int, int]) -> Call:
    """A batched merge of weights `[N, K]` and rank r."""
    Ws = [torch.randn(N, K, device=DEVICE).to(DTYPES[dtype]) for N, K, _ in sizes]
    As = [torch.randn(r, K, device=DEVICE) for _, K, r in sizes]
    Bs = [torch.randn(N, r, device=DEVICE) for N, _, r in sizes]
    return partial(slora.merging.batched_merge_, Ws, As, Bs, [0.5] * len(Ws))


def everything() -> None:
    """Odd shapes in every dtype, with gates that the host knows and with the device's own."""
    for dtype in ("bf16", "fp32") if ON_GPU else ("fp32",):
        merge(dtype, (96, 64, 16), (33, 47, 4), (130, 300, 40), (7, 5, 3))()
        for size in ((64, 96, 37, 16, 1, 1), (72, 48, 5, 4, 2, 3), (40, 64, 130, 20, 4, 4)):
            for context in (nullcontext, slora.gates_on_device):
                with context():
                    layer(Shape(*size, dtype))()


def profile() -> None:
    """Every kernel of one forward and backward, and the merge."""
    calls = [layer(Shape(768, 3072, 50432, 16, dtype="bf16") if ON_GPU else Shape(32, 48, 24, 4))]
    edge, count, ranks = (1024, 96, (16, 128)) if ON_GPU else (16, 2, (4,))
    calls += [merge("bf16", *[(edge, edge, r)] * count) for r in ranks]
    for watched in (False, True):
        if ON_GPU and watched:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        for call in calls:
            call()
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main(arguments: Sequence[str]) -> int:
    """Run what is named."""
    parser = argparse.ArgumentParser("python -m benchmarks.sanitizer_runs", description="what a tool of CUDA observes")
    runs = {"all": everything, "profile": profile}
    parser.add_argument("run", choices=runs)
    run = runs[parser.parse_args(arguments).run]
    ieee_fp32()
    run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
