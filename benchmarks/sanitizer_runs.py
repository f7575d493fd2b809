"""Small runs of the kernels by themselves, for compute-sanitizer and the profiler.

    python -m benchmarks.sanitizer_runs all|profile

all       the batched merge over ragged weights, and one layer forward and backward over odd shapes, checked
profile   one large layer and one large merge, once each
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext

import torch

import slora
from benchmarks.correctness import expected, mismatch
from benchmarks.implementations.layer import IMPLEMENTATIONS, Problem, Shape
from benchmarks.timing import ieee_fp32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = "slora, triton"


def check() -> str | None:
    """What is wrong with a merge, or with a layer by the kernels, None where nothing is."""
    for dtype in (torch.bfloat16, torch.float32):
        sizes = ((96, 64, 16), (33, 47, 4), (130, 300, 40), (7, 5, 3))
        Ws = [torch.randn(n, k, device=DEVICE).to(dtype) for n, k, _ in sizes]
        As = [torch.randn(r, k, device=DEVICE) for _, k, r in sizes]
        Bs = [torch.randn(n, r, device=DEVICE) for n, _, r in sizes]
        terms = list(zip(Ws, As, Bs, strict=True))
        exact = {f"W{i}": W.double() + 0.5 * (B.double() @ A.double()) for i, (W, A, B) in enumerate(terms)}
        own = {f"W{i}": (W.float() + 0.5 * (B @ A)).to(dtype) for i, (W, A, B) in enumerate(terms)}
        slora.merging.batched_merge_(Ws, As, Bs, [0.5] * len(Ws))
        wrong = mismatch({f"W{i}": W for i, W in enumerate(Ws)}, expected(exact, own, dtype))
        if wrong:
            return f"batched_merge_: {wrong}"
    for name in ("bf16", "fp32") if DEVICE == "cuda" else ("fp32",):
        for size in ((64, 96, 37, 16, 1, 1), (72, 48, 5, 4, 2, 3), (40, 64, 130, 20, 4, 4)):
            shape = Shape(*size, name)
            problem = Problem(shape, DEVICE, sets=1)
            layer = IMPLEMENTATIONS[KERNELS](problem)
            for context in (nullcontext, slora.gates_on_device):
                with context():
                    found = layer.trained(problem.xs[0], problem.dys[0])
                wrong = mismatch(found, problem.exact(updates=True), layer.wanted(shape))
                if wrong:
                    return f"{KERNELS} at {shape.point}: {wrong}"
    return None


def profile() -> str | None:
    """Every kernel of one forward and backward, and the merge; the profiler sees the second time alone."""
    large = DEVICE == "cuda"
    problem = Problem(Shape(768, 3072, 50432, 16, dtype="bf16") if large else Shape(32, 48, 24, 4), DEVICE, sets=1)
    layer = IMPLEMENTATIONS[KERNELS](problem)
    edge, count = (1024, 96) if large else (16, 2)
    Ws = [torch.randn(edge, edge, device=DEVICE).to(problem.dtype) for _ in range(count)]
    for watched in (False, True):
        if large and watched:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        layer.trained(problem.xs[0], problem.dys[0])
        for r in (16, 128) if large else (4,):
            As, Bs = [torch.randn(r, edge, device=DEVICE)] * count, [torch.randn(edge, r, device=DEVICE)] * count
            slora.merging.batched_merge_(Ws, As, Bs, [1.0] * count)
    if large:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return None


def main(arguments: Sequence[str]) -> int:
    """Run what is named; 1 where a result is wrong."""
    ieee_fp32()
    wrong = {"all": check, "profile": profile}[arguments[0]]()
    print(wrong or f"{arguments[0]}: right")
    return int(wrong is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
