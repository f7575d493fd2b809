"""FLOPs as counted are those of the closed form; bytes are those of the table of costs."""

from __future__ import annotations

import pytest
import torch

from benchmarks import counting
from benchmarks.contenders.layer import CONTENDERS, FROZEN, Problem, Shape

K, N, M, R = 24, 36, 10, 4


def _counted(name: str, active: int, blocks: int) -> int:
    problem = Problem(Shape(K, N, M, R, active, blocks, "fp32"), "cpu", sets=1)
    layer = CONTENDERS[name](problem)
    return counting.flops(lambda: layer.counted(problem.xs[0], problem.dys[0]))


@pytest.mark.parametrize(("active", "blocks"), [(0, 1), (1, 1), (0, 3), (1, 3), (2, 3), (3, 3)])
def test_flops_of_slora_are_the_base_and_six_products_per_active_block(active: int, blocks: int) -> None:
    # S, its update, T, dx, dA and dB: three with K and three with the block's outputs.
    expected = 2 * 2 * M * N * K + active * (3 * 2 * M * R * K + 3 * 2 * M * R * (N // blocks))
    assert _counted("slora, torch", active, blocks) == expected
    assert 4 * M * N * K + counting.lora_flops(M, N, K, R, active, active / blocks) == expected


def test_flops_of_the_other_ways_are_their_closed_forms() -> None:
    base, wide, narrow = 2 * M * N * K, 2 * M * R * K, 2 * M * R * N
    assert _counted(FROZEN, 1, 1) == 2 * base
    assert _counted("full", 1, 1) == 3 * base
    assert _counted("PEFT", 1, 1) == 2 * base + 3 * wide + 3 * narrow
    # It keeps x only and computes S again.
    assert _counted("addmm function", 1, 1) == 2 * base + 4 * wide + 3 * narrow


def test_bytes_beyond_a_frozen_layer_are_those_of_the_table() -> None:
    # In bytes of a 16-bit dtype: (MK, MN), from the table in the design.
    table = {"frozen": (0, 0), "eager": (12, 20), "addmm": (8, 8), "accumulate": (4, 2), "fused": (2, 2)}
    frozen = counting.bytes_moved("frozen", M, N, K, 2)
    assert frozen == 2 * 2 * (M * K + N * K + M * N)
    for form, (mk, mn) in table.items():
        assert counting.bytes_moved(form, M, N, K, 2) - frozen == mk * M * K + mn * M * N
    assert counting.bytes_moved("full", M, N, K, 2) - frozen == 2 * (M * K + M * N + N * K)


def test_an_inactive_layer_moves_what_a_frozen_one_does() -> None:
    for form in ("addmm", "fused"):
        assert counting.bytes_moved(form, M, N, K, 2, share=0.0) == counting.bytes_moved("frozen", M, N, K, 2)


def test_a_prediction_adds_bytes_and_flops_at_their_ceilings() -> None:
    ceilings = {"gemm_flops_per_s": {"fp32": 1e9}, "copy_bytes_per_s": 1e8}
    found = counting.predicted_seconds(1.0, "fused", M, N, K, R, 1, 1.0, "fp32", 4, ceilings)
    assert found == pytest.approx(1.0 + 4 * (M * K + M * N) / 1e8 + 6 * M * R * (K + N) / 1e9)


def test_percent_of_a_ceiling() -> None:
    ceilings = {"gemm_flops_per_s": {"fp32": 100.0}, "copy_bytes_per_s": 10.0}
    assert counting.percent(ceilings, "fp32", 2.0, 50, 10) == {"percent_of_gemm": 25.0, "percent_of_copy": 50.0}
    assert counting.percent(ceilings, "fp16", 2.0, 50, 10) == {"percent_of_copy": 50.0}


def test_the_counter_sees_products_in_place() -> None:
    y = torch.zeros(M, N)
    assert counting.flops(lambda: y.addmm_(torch.ones(M, K), torch.ones(K, N))) == 2 * M * N * K
