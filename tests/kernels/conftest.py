"""Where the kernels' tests run, on the GPU if there is one, else in Triton's interpreter on CPU tensors; and problems
with what the formulas of `slora/reference.py` give, written out here once more."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from slora.ops.dropout import keep_mask
from slora.ops.operands import LoRAOperands

THRESHOLD, SCALING = 0.1, 0.7


@pytest.fixture
def device() -> torch.device:
    """The device that the kernels run on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# tl.dot of bf16 operands returns garbage in the interpreter, where alone fp32 is served.
_DTYPES = [torch.float16 if torch.cuda.is_available() else torch.float32, torch.float16]
_DTYPES.append(pytest.param(torch.bfloat16, marks=pytest.mark.gpu))


@pytest.fixture(params=_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype of activations that the kernels take here."""
    return request.param


@pytest.fixture
def exact_dtype() -> torch.dtype:
    """The dtype of the smallest rounding that the kernels take here."""
    return _DTYPES[0]


@pytest.fixture
def fenced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put 1024 elements behind what kernels write to, and fail if the test changed one of them."""
    fences = []

    def fence(allocate: Callable[..., Tensor], *shape: Any, **options: Any) -> Tensor:
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        size = math.prod(sizes)
        memory = allocate(size + 1024, **options)
        fences.append(memory[size:].fill_(7.0))
        return memory[:size].view(sizes)

    empty, new_empty = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: fence(empty, *shape, **options))
    monkeypatch.setattr(
        torch,
        "empty_like",
        lambda like, dtype=None: fence(empty, *like.shape, dtype=dtype or like.dtype, device=like.device),
    )
    monkeypatch.setattr(
        Tensor,
        "new_empty",
        lambda self, *shape, **options: fence(lambda n, **o: new_empty(self, n, **o), *shape, **options),
    )
    yield
    monkeypatch.undo()
    assert fences
    assert all(bool((elements == 7.0).all()) for elements in fences)


@dataclasses.dataclass
class Problem:
    """One adapted layer and the gradient of its output, all on one device."""

    x: Tensor
    W: Tensor
    bias: Tensor | None
    dy: Tensor
    operands: LoRAOperands
    active: list[int]
    """The active blocks, whether or not the operands say so."""

    def computed_in(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return y, S, dx, T, dA, dB and dgate, block by block, every product in `dtype`."""
        A, B, _, _, _, host_known, p, seed = self.operands
        M, n, c = len(self.x), self.operands.n, self.operands.factor
        x, W, dy, A, B = (t.to(dtype) for t in (self.x, self.W, self.dy, A, B))
        masked = x if seed is None else x * keep_mask(*x.shape, p, seed, dtype)
        y, dx = x @ W.T, dy @ W
        if self.bias is not None:
            y += self.bias.to(dtype)
        dA, dB, dgate = torch.zeros_like(A), torch.zeros_like(B), torch.zeros(len(A), dtype=dtype, device=x.device)
        S, T = [], []
        for i in range(len(A)):
            columns = slice(i * n, (i + 1) * n)
            if i in self.active:
                S.append(masked @ A[i].T)
                T.append(dy[:, columns] @ B[i])
                y[:, columns] += c * (S[-1] @ B[i].T)
                update = c * (T[-1] @ A[i])
                dx += update if seed is None else update * keep_mask(*x.shape, p, seed, dtype)
                dA[i], dB[i] = c * (T[-1].T @ masked), c * (dy[:, columns].T @ S[-1])
                dgate[i] = (dB[i] * B[i]).sum()
            elif host_known is None:
                S.append(x.new_zeros(M, A.shape[1]))
                T.append(S[-1])
        return {
            "y": y, "S": torch.cat(S, 1), "dx": dx, "T": torch.cat(T, 1), "dA": dA, "dB": dB, "dgate": dgate,
        }  # fmt: skip

    def compare(self, check: Callable[..., None], found: dict[str, Tensor], what: str = "") -> None:
        """Check each of `found` against the computation in fp64, with the error of that in its dtype for a measure."""
        exact, eager = self.computed_in(torch.float64), self.computed_in(self.x.dtype)
        for name, ours in found.items():
            more = {}
            if name == "dgate":
                # A sum of n * r terms that cancel: its unit of rounding is that of their 2-norm; in 16 bits it is
                # that of the S and T, sums over M rows, that went into it.
                B = torch.where(exact["dB"] == 0, 0.0, self.operands.lora_B.double())
                coarser = torch.finfo(self.x.dtype).eps / torch.finfo(ours.dtype).eps
                norm = float((exact["dB"] * B).square().sum((1, 2)).sqrt().max())
                more = {"magnitude": norm * coarser, "terms": len(self.x) if coarser > 1 else B[0].numel()}
            check(ours, eager[name].to(ours.dtype), exact[name], f"{name} {what}", **more)


@pytest.fixture
def make_problem(device: torch.device) -> Callable[..., Problem]:
    """Return `make(M, K, n, blocks, r, which, dtype, ...)`: `which` of the blocks are active, "all", "none", "some".

    A and B of the others hold NaN and infinity: nothing of them may reach a result.
    """

    def make(
        M: int, K: int, n: int, blocks: int, r: int, which: str = "all", dtype: torch.dtype = torch.float16,
        host_known: bool = True, bias: bool = True, dropout: float = 0.0,
    ) -> Problem:  # fmt: skip
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape).to(device=device, dtype=dtype)

        active = {"all": list(range(blocks)), "none": [], "some": [i for i in range(blocks) if i % 3 != 1]}[which]
        inactive = [i for i in range(blocks) if i not in active]
        gate = torch.full((blocks,), THRESHOLD - 0.05)
        gate[active] = THRESHOLD + 0.05
        A, B = normal(blocks, r, K) / K**0.5, normal(blocks, n, r) / r**0.5
        A[inactive], B[inactive] = math.nan, math.inf
        seed = torch.tensor(11, device=device) if dropout else None
        return Problem(
            x=normal(M, K),
            W=normal(blocks * n, K) / K**0.5,
            bias=normal(blocks * n) if bias else None,
            dy=normal(M, blocks * n),
            operands=LoRAOperands(
                A, B, gate.to(device), THRESHOLD, SCALING, active if host_known else None, dropout, seed
            ),
            active=active,
        )

    return make


@pytest.fixture(autouse=True)
def _poisoned(poisoned: None) -> None:
    """Every test of a kernel runs with poisoned allocations: an element that nobody wrote is NaN."""
