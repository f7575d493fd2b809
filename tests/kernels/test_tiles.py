"""Tiles by pointers, far from the start of their matrix."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from slora.kernels import tiles


@triton.jit
def move(source, target, row, rows, columns, stride, LOW: tl.constexpr):
    """Copy `source[row:row + 4, :columns]` to the same place of `target`."""
    if LOW:
        tile = tiles.load_low(source, row, 0, rows, columns, stride, 4, 16)
        tiles.store_low(target, tile, row, rows, columns, stride, 4, 16)
    else:
        tile = tiles.load(source, row, 0, rows, columns, stride, 4, 16, False)
        tiles.store(target, tile, row, 0, 0, rows, columns, stride, 4, 16, False, False)


@pytest.mark.parametrize("low", [False, True])
def test_a_tile_may_lie_beyond_2_to_the_31_elements_and_ends_with_its_matrix(low: bool, device: torch.device) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    # The last rows of a matrix of 4 GiB of addresses, of which a few pages are touched.
    row, stride = 2**18, 2**13
    memory = (torch.empty((row + 4) * stride, dtype=torch.float16, device=device) for _ in range(2))
    source, target = (m.view(row + 4, stride)[row:] for m in memory)
    source.copy_(torch.randn(4, stride))
    target.fill_(-1.0)
    whole = (m.as_strided((row + 4, stride), (stride, 1), 0) for m in (source, target))
    move[(1,)](*whole, row, row + 3, 11, stride, LOW=low)
    expected = torch.full_like(target, -1.0)
    expected[:3, :11] = source[:3, :11]
    assert torch.equal(target, expected)
