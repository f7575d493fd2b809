"""LoRA dropout by counter: the numbers are uniform and independent, and nothing but the seed decides them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from slora.ops import dropout

# Every figure below is a sum of independent terms of mean 0 and variance 1, divided by the root of their number, so
# that under independence it is close to a standard normal. Seeds are fixed: these tests give one result.


def signs(M: int, K: int, p: float, seed: int = 1) -> Tensor:
    """The mask shifted and scaled to mean 0 and variance 1."""
    kept = dropout.keep_mask(M, K, p, torch.tensor(seed), torch.float32).double()
    p = dropout.drop_units(p) / dropout.UNITS
    return (kept - (1 - p)) / math.sqrt(p * (1 - p))


def score(terms: Tensor) -> float:
    return float(terms.sum()) / math.sqrt(terms.numel())


def by_hand(seed: int, row: int, column: int, drop: int) -> bool:
    """The formula of the module's docstring for one element, in Python integers."""
    word = 0xFFFFFFFF

    def mix(z: int) -> int:
        z &= word
        z = (z ^ z >> 16) * 0x21F0AAAD & word
        z = (z ^ z >> 15) * 0x735A2D97 & word
        return z ^ z >> 15

    low, high = seed & word, seed >> 32 & word
    key0 = mix(low + mix(high ^ 0x9E3779B9))
    key1 = mix(high + mix(key0 ^ 0x85EBCA6B))
    key2 = mix(key0 ^ (key1 + 0xC2B2AE35 & word))
    a, b, c = mix(row ^ key0), mix(row + key1), mix(column // 2 + key2)
    z = a ^ c
    z = (z ^ z >> 16) * 0x21F0AAAD & word
    z = (z ^ z >> 15 ^ b) * 0x735A2D97 & word
    if column % 2:
        z = (z ^ z << 16) & word
    return z >> 16 >= drop


@pytest.mark.parametrize("seed", [0, 5, -7, 2**62 - 1, 2**40 + 3])
def test_the_mask_is_the_stated_formula(seed: int) -> None:
    kept = dropout.keep_mask(7, 13, 0.3, torch.tensor(seed), torch.float32)
    drop = dropout.drop_units(0.3)
    wanted = [[float(by_hand(seed, row, column, drop)) for column in range(13)] for row in range(7)]
    assert kept.tolist() == wanted


def test_a_mask_made_in_pieces_is_the_mask_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dropout.keep_mask(53, 21, 0.4, torch.tensor(3), torch.float32)
    monkeypatch.setattr(dropout, "_AT_ONCE", {"cpu": 64})
    assert torch.equal(dropout.keep_mask(53, 21, 0.4, torch.tensor(3), torch.float32), whole)


@pytest.mark.parametrize(("M", "K"), [(0, 5), (1, 1), (3, 0), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool], ids=str)
def test_the_mask_has_the_shape_and_dtype_asked_for(M: int, K: int, dtype: torch.dtype) -> None:
    kept = dropout.keep_mask(M, K, 0.5, torch.tensor(1), dtype)
    assert kept.shape == (M, K)
    assert kept.dtype == dtype


@pytest.mark.parametrize("p", [0.001, 0.1, 1 / 3, 0.5, 0.9])
def test_elements_are_dropped_with_the_probability_asked_for(p: float) -> None:
    z = signs(2000, 1001, p)
    assert abs(score(z)) < 5
    assert abs(score(z[:, ::2])) < 5
    assert abs(score(z[:, 1::2])) < 5


def test_the_sixteen_bits_of_an_element_are_uniform() -> None:
    # The mask at a probability of k/256 is the bits' distribution function there: counts between the steps.
    M, K = 500, 1000
    shares = [0.0]
    for k in range(1, 256):
        shares.append(1 - float(dropout.keep_mask(M, K, k / 256, torch.tensor(9), torch.float64).mean()))
    counts = np.diff([*shares, 1.0]) * M * K
    chi2 = float(((counts - M * K / 256) ** 2 / (M * K / 256)).sum())
    # 255 degrees of freedom: mean 255, standard deviation sqrt(510).
    assert abs(chi2 - 255) < 5 * math.sqrt(510)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("shift", [(0, 1), (0, 2), (1, 0), (1, 1), (1, -1), (8, 0), (0, 64), (128, 64)], ids=str)
def test_neighbours_are_independent(p: float, shift: tuple[int, int]) -> None:
    z = signs(1500, 700, p)
    down, right = shift
    product = z * z.roll((-down, -right), (0, 1))
    assert abs(score(product)) < 5
    # Within a pair that shares a hash, and between pairs.
    assert abs(score(product[:, ::2])) < 5
    assert abs(score(product[:, 1::2])) < 5


def test_rectangles_are_independent() -> None:
    # Row and column keys are combined by xor: the four corners of a rectangle would show it.
    z = signs(1500, 700, 0.5)
    for down, right in itertools.product((1, 3, 64), (1, 2, 5, 64)):
        corners = z[:-down, :-right] * z[down:, :-right] * z[:-down, right:] * z[down:, right:]
        assert abs(score(corners)) < 5, (down, right)


@pytest.mark.parametrize("along", ["rows", "columns"])
def test_no_two_rows_and_no_two_columns_resemble_each_other(along: str) -> None:
    z = signs(1000, 1000, 0.5)
    z = z if along == "rows" else z.T
    pairs = z @ z.T / math.sqrt(1000)
    scores = pairs[torch.triu(torch.ones_like(pairs, dtype=torch.bool), 1)]
    # Half a million standard normals: a largest one above 6 has probability 0.001; their variance is 1 to 0.2 %.
    assert float(scores.abs().max()) < 6
    assert abs(float(scores.var()) - 1) < 5 * math.sqrt(2 / scores.numel())


def test_seeds_that_differ_in_one_bit_give_unrelated_masks() -> None:
    seeds = [0, *(1 << bit for bit in range(63)), -1]
    masks = torch.stack([signs(40, 50, 0.5, seed).flatten() for seed in seeds])
    pairs = masks @ masks.T / math.sqrt(masks.shape[1])
    pairs.fill_diagonal_(0)
    # 2080 pairs.
    assert float(pairs.abs().max()) < 5.5


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.999, 1 - 1e-9])
def test_what_is_kept_is_scaled_by_the_probability_that_is_realised(p: float) -> None:
    realised = dropout.drop_units(p) / dropout.UNITS
    assert abs(realised - p) <= 2**-17 or p > 1 - 2**-17
    assert dropout.rescaling(p) == 1 / (1 - realised)


def test_the_mask_does_not_depend_on_the_state_of_any_generator() -> None:
    torch.manual_seed(1)
    one = dropout.keep_mask(5, 6, 0.5, torch.tensor(4), torch.float32)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(dropout.keep_mask(5, 6, 0.5, torch.tensor(4), torch.float32), one)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
def test_the_mask_is_the_same_on_every_device() -> None:
    seed = torch.tensor(12345)
    there = dropout.keep_mask(333, 77, 0.2, seed.cuda(), torch.float32)
    assert torch.equal(there.cpu(), dropout.keep_mask(333, 77, 0.2, seed, torch.float32))
