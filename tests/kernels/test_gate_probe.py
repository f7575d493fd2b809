"""The probe of inactive gates: the rows it draws and the sums it forms, for one layer and for several."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slora.kernels import gate_probe
from slora.kernels.gate_probe import Layer
from slora.probe import sampled_rows

# M, sampled rows, K, blocks, n, r, active, seed
CASES = {
    "one row of one": (1, 1, 16, 1, 8, 4, (), 1),
    "sampled": (150, 40, 37, 3, 13, 4, (0,), 3),
    "all rows": (33, 64, 16, 1, 20, 16, (), 2**40 + 7),
    "rank above a group": (300, 100, 24, 2, 8, 70, (1,), 123456789),
    "all active": (7, 7, 8, 4, 2, 1, (0, 1, 2, 3), 5),
    "70 blocks": (20, 10, 16, 70, 2, 2, (0, 69), 9),
}


def layer(case: str, dtype: torch.dtype, device: torch.device, lora_dtype: torch.dtype | None = None) -> Layer:
    M, m, K, blocks, n, r, active, seed = CASES[case]
    x, dy = torch.randn(M, K), torch.randn(M, blocks, n)
    A, B = torch.randn(blocks, r, K) / math.sqrt(K), torch.randn(blocks, n, r) / math.sqrt(n)
    # Nothing may read these.
    dy[:, list(active)], A[list(active)], B[list(active)] = math.nan, math.nan, math.nan
    gate = torch.full((blocks,), 0.05)
    gate[list(active)] = 0.15
    x, dy = (t.flatten(1).to(device, dtype) for t in (x, dy))
    A, B = (t.to(device, lora_dtype or dtype) for t in (A, B))
    return Layer(dy, x[sampled_rows(M, m, seed, device)], A, B, gate.to(device), 0.1, 1.7, seed)


def terms(given: Layer, dtype: torch.dtype) -> Tensor:
    """`c * S * T` of every sampled row, `[m, blocks, r]`, in `dtype`; 0 for active blocks."""
    M, m, blocks = given.dy.shape[0], given.x.shape[0], given.gate.shape[0]
    A, B = (t.to(given.x.dtype).to(dtype) for t in (given.lora_A, given.lora_B))
    dy = given.dy[sampled_rows(M, m, given.seed, given.dy.device)].to(dtype).view(m, blocks, -1)
    S = torch.einsum("mk,brk->mbr", given.x.to(dtype), A)
    T = torch.einsum("mbn,bnr->mbr", dy, B)
    products = given.scaling * S.double() * T.double()
    return torch.where((given.gate < given.threshold)[:, None], products, 0)


def compare(check: Callable[..., None], given: Layer, found: Tensor, name: str) -> None:
    wanted, rounded = terms(given, torch.float64), terms(given, given.x.dtype)
    # A single sum that cancels: its unit of rounding is that of the 2-norm of its terms.
    magnitude = float(wanted.square().sum((0, 2)).sqrt().max())
    terms_of_S_and_T = max(given.x.shape[1], given.lora_B.shape[1])
    check(found, rounded.sum((0, 2)).float(), wanted.sum((0, 2)), name, magnitude, terms_of_S_and_T)


@pytest.mark.parametrize("lora", ["same", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_the_probe_of_a_layer_is_the_sum_over_the_sampled_rows_of_inactive_blocks(
    dtype: torch.dtype, case: str, lora: str, device: torch.device, assert_as_exact_as: Callable[..., None]
) -> None:
    given = layer(case, dtype, device, None if lora == "same" else torch.float32)
    (found,) = gate_probe.gate_probe([given])
    compare(assert_as_exact_as, given, found, case)


def test_layers_of_different_shapes_share_a_launch(
    dtype: torch.dtype, device: torch.device, assert_as_exact_as: Callable[..., None]
) -> None:
    cases = ("sampled", "all rows", "all active", "one row of one")
    given = [layer(case, dtype, device, torch.float32) for case in cases]
    found = gate_probe.gate_probe(given)
    assert len(found) == len(given)
    for case, one, gradient in zip(cases, given, found, strict=True):
        compare(assert_as_exact_as, one, gradient, case)


def test_layers_of_different_dtypes_do_not_share_a_launch(device: torch.device) -> None:
    given = [layer("sampled", torch.float32, device), layer("all rows", torch.float16, device)]
    with pytest.raises(ValueError, match="share a device and the dtypes of x and of lora_A"):
        gate_probe.gate_probe(given)


def test_no_layers_and_no_rows_have_a_result(device: torch.device) -> None:
    assert gate_probe.gate_probe([]) == []
    given = layer("all rows", torch.float32, device)
    empty = given._replace(dy=given.dy[:0], x=given.x[:0])
    assert gate_probe.gate_probe([empty])[0].tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("M", "m"), [(2, 1), (97, 13), (1000, 512), (4096, 1)])
@pytest.mark.parametrize("seed", [0, 7, 2**31 + 5, 2**45 + 1])
def test_the_kernel_copies_the_rows_that_the_hash_names(
    M: int, m: int, seed: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.randn(M, 41).to(device, dtype)[:, 2:39]
    assert torch.equal(gate_probe.sample_rows(x, m, seed), x[sampled_rows(M, m, seed, device)])


@pytest.mark.parametrize("shift", [13, 2**31 - 1])
def test_a_shift_on_the_device_is_a_part_of_the_seed(shift: int, device: torch.device) -> None:
    near = [layer("sampled", torch.float32, device), layer("rank above a group", torch.float32, device)]
    on_device = torch.tensor(shift, device=device)
    away = [given._replace(seed=given.seed - shift, shift=on_device) for given in near]
    for given, other in zip(near, away, strict=True):
        assert torch.equal(gate_probe.gate_probe([given])[0], gate_probe.gate_probe([other])[0])
        assert not torch.equal(*(gate_probe.gate_probe([o])[0] for o in (given, given._replace(shift=on_device))))
    one_shifted = [near[0], away[1]]
    for given in (away, one_shifted):
        assert torch.equal(*(torch.cat(gate_probe.gate_probe(layers)) for layers in (near, given)))
    x = torch.randn(1000, 41, device=device)
    rows = sampled_rows(1000, 300, torch.tensor(7, device=device) + on_device, device)
    assert torch.equal(gate_probe.sample_rows(x, 300, 7, on_device), x[rows])


def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    given = [layer("sampled", torch.float16, device), layer("rank above a group", torch.float16, device)]
    for one, two in zip(gate_probe.gate_probe(given), gate_probe.gate_probe(given), strict=True):
        assert torch.equal(one, two)


def test_an_element_of_x_or_dy_may_lie_beyond_2_to_the_31(device: torch.device) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    M, K, n, stride = 3, 40, 24, 2**30 + 8
    x, dy = torch.randn(M, K).to(device, torch.float16), torch.randn(M, n).to(device, torch.float16)
    A, B = torch.randn(1, 4, K, device=device), torch.randn(1, n, 4, device=device)
    near = Layer(dy, x, A, B, torch.zeros(1, device=device), 0.1, 1.7, 5)
    # Three rows, 4 GiB of addresses, of which three pages are touched.
    far = torch.empty(2 * stride + 64, dtype=torch.float16, device=device).as_strided((M, 64), (stride, 1))
    far[:, :K], far[:, K:] = x, dy
    away = near._replace(x=far[:, :K], dy=far[:, K:])
    assert torch.equal(*(gate_probe.gate_probe([given])[0] for given in (near, away)))
    assert torch.equal(*(torch.stack(gate_probe.gate_probe([given, given])) for given in (near, away)))
    assert torch.equal(gate_probe.sample_rows(far, 2, 9), far[sampled_rows(M, 2, 9, device)])


def test_more_rows_than_the_draw_can_count_are_refused() -> None:
    rows = torch.empty(1, 4, device="meta").expand(2**30, 4)
    A, B, gate = torch.empty(1, 2, 4), torch.empty(1, 4, 2), torch.empty(1)
    with pytest.raises(ValueError, match=r"m=512 of M=1073741824 rows cannot be drawn .* below 2\*\*39"):
        gate_probe.sample_rows(rows, 512, 0)
    with pytest.raises(ValueError, match="m=512 of M=1073741824"):
        gate_probe.gate_probe([Layer(rows, rows[:512], A, B, gate, 0.1, 1.0, 0)])
