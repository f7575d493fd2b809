"""Signs of LoRA pairs: against ComPEFT's rule written out by hand, and their packing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slora.adapters.ternary import balanced, pack, signs_of, squared_error, unpack

pytestmark = pytest.mark.once

A = torch.tensor([[0.1, -0.9, 0.2, 0.05], [0.8, 0.0, -0.3, 0.7]])
B = torch.tensor([[0.5, 0.1], [-0.2, 0.6], [0.05, -0.4]])


def _by_hand(matrix: Tensor, count: int) -> Tensor:
    """ComPEFT's rule for one matrix: the signs of its `count` largest magnitudes."""
    cut = sorted(matrix.abs().flatten().tolist())[-count]
    return torch.tensor([[math.copysign(1, v) if abs(v) >= cut else 0 for v in row] for row in matrix.tolist()])


def test_the_largest_magnitudes_keep_their_sign() -> None:
    # A quarter of 8, and of 6 values half: 2 and, rounded to even, 2.
    signs = signs_of(A, B, 0.25, "fit")
    given, other = (_by_hand(A, 2), _by_hand(B, 2)), tuple(_by_hand(m, 2) for m in balanced(A, B))
    found = signs.A.float(), signs.B.float()
    assert any(torch.equal(found[0], a) and torch.equal(found[1], b) for a, b in (given, other))


def test_of_the_two_pairs_the_one_nearer_to_the_update_is_taken() -> None:
    def cosine(a: Tensor, b: Tensor) -> float:
        one, two = (B @ A).flatten(), (_by_hand(b, 3) @ _by_hand(a, 4)).flatten()
        return float(one @ two / one.norm() / two.norm())

    signs = signs_of(A, B, 0.5, "norm")
    update = signs.B.float() @ signs.A.float()
    found = float((update * (B @ A)).sum() / update.norm() / (B @ A).norm())
    assert found == pytest.approx(max(cosine(A, B), cosine(*balanced(A, B))), rel=1e-5)


@pytest.mark.parametrize("scale", ["norm", "fit", 2.0])
def test_the_scale_is_that_of_its_rule(scale: str | float) -> None:
    signs = signs_of(A, B, 0.5, scale)
    update, T = B @ A, signs.B.float() @ signs.A.float()
    plain = torch.equal(signs.A.float(), _by_hand(A, 4))
    P, Q = (A, B) if plain else balanced(A, B)
    expected = {
        "norm": update.norm() / T.norm(),
        "fit": (update * T).sum() / T.square().sum(),
        2.0: 4 * P.std(correction=0) * Q.std(correction=0),
    }[scale]
    assert signs.scale**2 == pytest.approx(float(expected), rel=1e-5)


def test_the_fitted_scale_has_the_least_error() -> None:
    best = signs_of(A, B, 0.5, "fit")
    errors = [squared_error(A, B, best._replace(scale=best.scale * f))[0] for f in (0.9, 0.99, 1.0, 1.01, 1.1)]
    assert min(errors) == errors[2]


def test_the_error_is_that_of_the_products() -> None:
    signs = signs_of(A, B, 0.5, "norm")
    restored = signs.scale**2 * signs.B.float() @ signs.A.float()
    error, size = squared_error(A, B, signs)
    assert error == pytest.approx(float((B @ A - restored).square().sum()), rel=1e-5)
    assert size == pytest.approx(float((B @ A).square().sum()), rel=1e-5)


@pytest.mark.parametrize("scale", ["norm", "fit", 1.5])
def test_an_update_of_zero_stays_zero(scale: str | float) -> None:
    signs = signs_of(A, torch.zeros(3, 2), 0.5, scale)
    assert not (signs.scale * signs.B.float()).any()
    assert squared_error(A, torch.zeros(3, 2), signs) == (0.0, 0.0)


def test_the_balanced_pair_has_the_same_product_and_equal_norms() -> None:
    for r, K, n in ((2, 4, 3), (5, 4, 3), (3, 7, 2)):
        P, Q = torch.randn(r, K), torch.randn(n, r)
        a, b = balanced(P, Q)
        torch.testing.assert_close(b @ a, Q @ P)
        assert (a.shape, b.shape) == (P.shape, Q.shape)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-3, atol=1e-3)


@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=70))
def test_packed_signs_come_back(values: list[int]) -> None:
    trits = torch.tensor(values, dtype=torch.int8)
    assert unpack(pack(trits), len(values)).tolist() == values


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_packed_signs_take_little_more_than_their_entropy(density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(100_000, generator=generator)
    trits = ((draws < density / 2).to(torch.int8) - (draws > 1 - density / 2).to(torch.int8)).to(torch.int8)
    shares = [density / 2, 1 - density, density / 2]
    entropy = -sum(p * math.log2(p) for p in shares) * len(trits) / 8
    # A Huffman code spends less than a bit more than the entropy on each byte of five signs.
    assert entropy * 0.98 < len(pack(trits)) < entropy + len(trits) / 5 / 8 + 300


@pytest.mark.parametrize(
    "packed", [b"", b"nothing", pack(torch.ones(9, dtype=torch.int8)), pack(torch.ones(20, dtype=torch.int8))], ids=len
)
def test_another_number_of_signs_is_refused(packed: bytes) -> None:
    with pytest.raises(ValueError, match=r"cut off|does not hold|header|incomplete"):
        unpack(packed, 15)
