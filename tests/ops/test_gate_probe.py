"""The rows that a gate probe reads: spread evenly, uniform over many seeds, independent."""

from __future__ import annotations

import math

import pytest
import torch

from slora.ops.gate_probe import sampled_rows


def test_sampled_rows_at_the_largest_sizes_do_not_overflow() -> None:
    rows = sampled_rows(2**30, 511, 7)
    assert 0 <= int(rows.min()) <= int(rows.max()) < 2**30
    assert bool((rows.diff() > 0).all())


@pytest.mark.parametrize(("M", "m"), [(7, 3), (50, 16), (5, 4)])
def test_rows_drawn_over_many_seeds_are_uniform(M: int, m: int) -> None:
    draws = 6000
    counts = torch.zeros(M)
    for seed in range(draws):
        counts += torch.bincount(sampled_rows(M, m, seed * 0x10001), minlength=M)
    # A row is drawn at most twice per seed, in independent strata: its count has a variance below draws * m / M.
    # Five standard errors for M <= 50 rows.
    bound = 5 * math.sqrt(draws * m / M)
    assert float((counts - draws * m / M).abs().max()) < bound


def test_rows_of_different_strata_and_seeds_are_uncorrelated() -> None:
    M, m, draws = 1600, 16, 4000
    u = torch.stack([sampled_rows(M, m, seed) - torch.arange(m) * M // m for seed in range(draws)]).double()
    u = (u - u.mean(0)) / u.std(0)
    bound = 5 / math.sqrt(draws)
    across = (u.T @ u / draws - torch.eye(m)).abs().max()
    assert float(across) < bound
    assert float((u[1:] * u[:-1]).mean(0).abs().max()) < bound
