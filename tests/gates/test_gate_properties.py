"""Properties of sampled rows, of the penalty's schedule and of the proximal step, over free inputs."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import slora
from slora.ops.gate_probe import sampled_rows


@settings(max_examples=300, deadline=None)
@given(M=st.integers(1, 10**7), m=st.integers(1, 600), seed=st.integers(0, 2**40))
def test_sampled_rows_rise_within_range_one_per_stratum(M: int, m: int, seed: int) -> None:
    rows = sampled_rows(M, m, seed)
    assert rows.dtype == torch.int64
    assert rows.shape == (min(m, M),)
    assert 0 <= int(rows.min()) <= int(rows.max()) < M
    assert bool((rows.diff() >= 0).all())
    if m < M:
        k = torch.arange(m)
        assert bool((rows >= k * M // m).all())
        assert bool((rows <= ((k + 1) * M - 1) // m).all())
    assert torch.equal(rows, sampled_rows(M, m, seed))


@settings(max_examples=30, deadline=None)
@given(M=st.integers(2, 60), data=st.data())
def test_every_row_is_expected_m_over_M_times(M: int, data: st.DataObject) -> None:
    """Exact by exhausting the random number: the hash is replaced by every value of a grid in turn."""
    m = data.draw(st.integers(1, M - 1))
    points = 1024
    counts = torch.zeros(M)
    for u in range(0, 2**24, 2**24 // points):
        with mock.patch("slora.ops.gate_probe.mix", lambda k, u=u: torch.full_like(k, u << 8)):
            counts += torch.bincount(sampled_rows(M, m, 0), minlength=M)
    # A row's share of the grid is off by at most one point per stratum that it touches, of which there are two.
    assert float((counts / points - m / M).abs().max()) <= 2 / points + 1e-6


@settings(max_examples=200, deadline=None)
@given(
    step=st.integers(0, 2000),
    penalty=st.floats(0, 10),
    warmup=st.integers(0, 500),
    ramp=st.integers(0, 500),
)
def test_penalty_warms_up_then_ramps_to_its_value(step: int, penalty: float, warmup: int, ramp: int) -> None:
    value = slora.penalty_at(step, penalty, warmup, ramp)
    assert value <= slora.penalty_at(step + 1, penalty, warmup, ramp) <= penalty
    if step < warmup:
        assert value == 0.0
    elif step >= warmup + ramp:
        assert value == penalty
    else:
        assert value == pytest.approx(penalty * (step - warmup + 1) / ramp)


@settings(max_examples=200, deadline=None)
@given(
    scores=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=6),
    slopes=st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=6),
    lr=st.floats(0, 1),
    penalty=st.floats(0, 10),
)
def test_proximal_step_solves_its_minimisation(
    scores: list[float], slopes: list[float], lr: float, penalty: float
) -> None:
    """`argmin_g |g - (gate - lr grad)|^2 / 2 + lr * penalty / blocks * |g|`, element by element."""
    gate = nn.Parameter(torch.tensor(scores))
    gate.grad = torch.tensor(slopes[: len(scores)])
    wide = torch.tensor(scores).double() - lr * gate.grad.double()
    shrink = lr * penalty / len(scores)
    expected = wide.sign() * (wide.abs() - shrink).clamp(min=0)
    slora.ProximalGates([gate], lr=lr, penalty=penalty).step()
    # Three fp32 roundings of numbers up to 7: the product, the gradient step, the shrinking.
    atol = 3 * 7 * torch.finfo(torch.float32).eps / 2
    torch.testing.assert_close(gate.detach().double(), expected, rtol=0, atol=atol)
