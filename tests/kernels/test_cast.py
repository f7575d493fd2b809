"""A and B in 16 bits by one launch, against PyTorch's own casts."""

from __future__ import annotations

import pytest
import torch

from slora.kernels import cast
from slora.ops.backends.triton import Triton
from slora.ops.operands import LoRAOperands

LOW = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.usefixtures("fenced")
@pytest.mark.parametrize("dtype", LOW, ids=["fp16", "bf16"])
@pytest.mark.parametrize("shapes", [((1, 4, 8), (1, 640, 4)), ((3, 5, 2048), (3, 7, 5))], ids=["B larger", "A larger"])
def test_both_are_rounded_as_pytorch_rounds(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: torch.device
) -> None:
    A, B = (torch.randn(shape, device=device) for shape in shapes)
    A[0, 0, :3] = torch.tensor([torch.inf, 1e30, 1e-7])
    low_A, low_B = cast.cast(A, B, dtype)
    assert torch.equal(low_A, A.to(dtype))
    assert torch.equal(low_B, B.to(dtype))


def test_the_backend_casts_matrices_of_any_layout_and_leaves_what_has_the_dtype(device: torch.device) -> None:
    def operands(A: torch.Tensor, B: torch.Tensor) -> LoRAOperands:
        return LoRAOperands(A, B, torch.ones(2, device=device), 0.1, 1.0, [0, 1])

    A, B, flat = torch.randn(2, 4, 8), torch.randn(2, 16, 4), torch.randn(1 + 2 * 4 * 8)
    A, B, flat = A.to(device), B.to(device), flat.to(device)
    for given in (operands(A, B), operands(A.mT.contiguous().mT, B), operands(flat[1:].view(2, 4, 8), B)):
        found, expected = Triton().cast(given, torch.float16), given.cast(torch.float16)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    low = operands(A.half(), B.half())
    assert Triton().cast(low, torch.float16) is low
