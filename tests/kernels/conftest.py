"""Where the kernels' tests run, on the GPU if there is one, else in Triton's interpreter on CPU tensors; gates, memory
and precisions for them; and problems for the two GEMM kernels with what PyTorch makes of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from slora import reference
from slora.dropout import kept, rescaling

THRESHOLD = 0.1


@pytest.fixture
def device() -> torch.device:
    """The device that the kernels run on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# tl.dot of bf16 operands returns garbage in the interpreter.
_DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture(params=_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype of activations that the kernels take."""
    return request.param


@pytest.fixture
def tf32() -> Iterator[None]:
    """Let products of fp32 matrices be computed in TF32. The interpreter computes them in fp32 all the same."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


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
        Tensor, "new_empty", lambda self, *shape, **options: fence(lambda n, **o: new_empty(self, n, **o), *shape)
    )
    yield
    monkeypatch.undo()
    assert fences
    assert all(bool((elements == 7.0).all()) for elements in fences)


def _as_multiplied(t: Tensor) -> Tensor:
    if t.device.type != "cuda" or t.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return t
    return (t.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def as_multiplied() -> Callable[[Tensor], Tensor]:
    """Return `f(t)`: t as products on a GPU read it. In TF32 the tensor cores drop the last 13 bits of fp32."""
    return _as_multiplied


@dataclasses.dataclass
class Problem:
    """Operands of one adapted layer, all on one device."""

    x: Tensor
    W: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    gate: Tensor
    dy: Tensor
    active: list[int]
    scaling: float = 0.7
    dropout: float = 0.0
    seed: Tensor | None = None
    threshold: float = THRESHOLD

    @property
    def blocks(self) -> int:
        return len(self.gate)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """The mask that x is multiplied with on the LoRA path, not divided by `1 - dropout`."""
        if self.seed is None:
            return torch.ones_like(self.x, dtype=dtype)
        return kept(*self.x.shape, self.dropout, self.seed, dtype)

    def in_slots(self, per_block: Tensor, slots: int) -> Tensor:
        """`[M, blocks, r]` as `[M, slots * r]`: the active blocks only, or all of them with zeros where inactive."""
        if slots < self.blocks:
            return per_block[:, self.active].flatten(1)
        on = torch.zeros(self.blocks, dtype=per_block.dtype, device=per_block.device)
        on[self.active] = 1
        return (per_block * on[:, None]).flatten(1)

    def forward(self, dtype: torch.dtype, slots: int) -> tuple[Tensor, Tensor]:
        """Return `(y, S)` of the reference, computed in `dtype`."""
        x, W, A, B = (_as_multiplied(t.to(dtype)) for t in (self.x, self.W, self.A, self.B))
        bias = None if self.bias is None else self.bias.to(dtype)
        masked = x * self.mask(dtype)
        x_lora = masked * rescaling(self.dropout)
        y = reference.selective_lora_linear(x, W, bias, A, B, self.gate.to(dtype), self.threshold, self.scaling, x_lora)
        return y, self.in_slots(torch.einsum("mk,brk->mbr", masked, A), slots)

    def backward(self, dtype: torch.dtype, slots: int) -> tuple[Tensor, Tensor]:
        """Return `(dx, T)` of the reference, computed in `dtype`."""
        dy, x, W, A, B = (_as_multiplied(t.to(dtype)) for t in (self.dy, self.x, self.W, self.A, self.B))
        base, lora = x.clone().requires_grad_(), x.clone().requires_grad_()
        mask = self.mask(dtype) * rescaling(self.dropout)
        gate = self.gate.to(dtype)
        y = reference.selective_lora_linear(base, W, None, A, B, gate, self.threshold, self.scaling, lora * mask)
        dx = sum(torch.autograd.grad(y, (base, lora), dy))
        T = torch.einsum("mbn,bnr->mbr", dy.view(len(dy), self.blocks, -1), B)
        return dx, self.in_slots(T, slots)


@pytest.fixture
def make_problem(device: torch.device) -> Callable[..., Problem]:
    """Return `make(M, K, n, blocks, r, which, dtype, ...)`: `which` of the blocks are active, "all", "none", "some"."""

    def make(
        M: int, K: int, n: int, blocks: int, r: int, which: str = "all", dtype: torch.dtype = torch.float32,
        low: torch.dtype | None = None, bias: bool = True, dropout: float = 0.0,
    ) -> Problem:  # fmt: skip
        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape).to(device=device, dtype=dtype)

        low = low or dtype
        active = {"all": list(range(blocks)), "none": [], "some": [i for i in range(blocks) if i % 3 != 1]}[which]
        gate = torch.full((blocks,), THRESHOLD - 0.05)
        gate[active] = THRESHOLD + 0.05
        return Problem(
            x=normal(M, K),
            W=normal(blocks * n, K) / K**0.5,
            bias=normal(blocks * n) if bias else None,
            A=normal(blocks, r, K, dtype=low) / K**0.5,
            B=normal(blocks, n, r, dtype=low),
            gate=gate.to(device),
            dy=normal(M, blocks * n),
            active=active,
            dropout=dropout,
            seed=torch.tensor(11, device=device) if dropout else None,
        )

    return make


@pytest.fixture(autouse=True)
def _poisoned(poisoned: None) -> None:
    """Every test of a kernel runs with poisoned allocations: an element that nobody wrote is NaN."""
