"""Small runs of the kernels by themselves, for compute-sanitizer and the profiler: `python -m benchmarks.small WHAT`.

kernels   one layer forward and backward over odd shapes and all patterns of activity, checked
merge     the batched merge over ragged weights, checked
all       both
profile   one large layer and one large merge, once each
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch

import slora
from benchmarks.contenders.layer import CONTENDERS, Problem, Shape, mistake
from benchmarks.results import BenchmarkError
from benchmarks.timing import ieee_fp32

KERNELS = "slora, triton"


def kernels(device: str) -> None:
    """Forward and backward by the kernels."""
    dtypes = ("bf16", "fp32") if device == "cuda" else ("fp32",)
    for dtype in dtypes:
        for shape in (
            Shape(64, 96, 37, 16, 1, 1, dtype),
            Shape(72, 48, 5, 4, 2, 3, dtype),
            Shape(40, 64, 130, 20, 4, 4, dtype),
        ):
            problem = Problem(shape, device, sets=1)
            layer = CONTENDERS[KERNELS](problem)
            # Without the allocator's pools, as the sanitizer wants it, nothing can be captured.
            for how, call in layer.ways(problem, capture=False).items():
                wrong = mistake(call(), problem.exact(updates=True), layer.wanted(shape))
                if wrong:
                    raise BenchmarkError(f"{KERNELS} at {shape.point}: {how}{wrong}")


def merge(device: str) -> None:
    """The batched merge."""
    for dtype in (torch.bfloat16, torch.float32):
        shapes, rank = ((96, 64), (33, 47), (130, 300), (7, 5)), (16, 4, 40, 3)
        Ws = [torch.randn(n, k, device=device).to(dtype) for n, k in shapes]
        As = [torch.randn(r, k, device=device) for (_, k), r in zip(shapes, rank, strict=True)]
        Bs = [torch.randn(n, r, device=device) for (n, _), r in zip(shapes, rank, strict=True)]
        exact, allowed = [], []
        for W, A, B in zip(Ws, As, Bs, strict=True):
            exact.append(W.double() + 0.5 * (B.double() @ A.double()))
            size = W.double().abs() + 0.5 * (B.double().abs() @ A.double().abs())
            # One rounding to the dtype, and the roundings of the sum in fp32 (slora.merging.batched).
            allowed.append(torch.finfo(dtype).eps * exact[-1].abs() + (A.shape[0] + 2) * 2.0**-24 * size)
        slora.merging.batched_merge_(Ws, As, Bs, [0.5] * len(Ws))
        for i, (W, wide, most) in enumerate(zip(Ws, exact, allowed, strict=True)):
            wrong = int(((W.double() - wide).abs() > most).sum())
            if wrong:
                raise BenchmarkError(
                    f"batched_merge_ of weight {i} in {dtype}: {wrong} of {W.numel()} numbers are wrong"
                )


def everything(device: str) -> None:
    """The merge, then the kernels."""
    merge(device)
    print("merge: right", flush=True)
    kernels(device)


def profile(device: str) -> None:
    """What the profiler looks at: every kernel of one forward and backward, and the merge, all of them warmed up."""
    large = device == "cuda"
    shape = Shape(768, 3072, 50432, 16, 1, 1, "bf16") if large else Shape(32, 48, 24, 4, 1, 1, "fp32")
    problem = Problem(shape, device, sets=1)
    layer = CONTENDERS[KERNELS](problem)
    edge, count = (1024, 96) if large else (16, 2)
    Ws = [torch.randn(edge, edge, device=device).to(problem.dtype) for _ in range(count)]
    ranks = (16, 128) if large else (4,)
    updates = {
        r: ([torch.randn(r, edge, device=device) for _ in Ws], [torch.randn(edge, r, device=device) for _ in Ws])
        for r in ranks
    }
    for watched in (False, True):
        if large and watched:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        layer.trained(problem.xs[0], problem.dys[0])
        for As, Bs in updates.values():
            slora.merging.batched_merge_(Ws, As, Bs, [1.0] * count)
    if large:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


RUNS: dict[str, Callable[[str], None]] = {"kernels": kernels, "merge": merge, "all": everything, "profile": profile}


def main(arguments: Sequence[str]) -> int:
    """Run what is named on the GPU, or on the CPU where there is none."""
    if len(arguments) != 1 or arguments[0] not in RUNS:
        print(f"name one of {', '.join(RUNS)}", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ieee_fp32()
    try:
        RUNS[arguments[0]](device)
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{arguments[0]}: right")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
