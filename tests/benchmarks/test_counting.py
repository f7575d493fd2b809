"""FLOPs as counted are those of the closed form; bytes are those of the table of costs."""

from __future__ import annotations

import pytest

from benchmarks import counting, models
from benchmarks.implementations import training
from benchmarks.implementations.layer import FROZEN, IMPLEMENTATIONS, Problem, Shape
from slora.ops.flops import count_flops

K, N, M, R = 24, 36, 10, 4


def _counted(name: str, active: int = 1, blocks: int = 1) -> int:
    problem = Problem(Shape(K, N, M, R, active, blocks), "cpu", sets=1)
    layer = IMPLEMENTATIONS[name](problem)
    return count_flops(layer.counted, problem.xs[0], problem.dys[0])


@pytest.mark.parametrize(("active", "blocks"), [(0, 1), (1, 1), (0, 3), (2, 3), (3, 3)])
def test_flops_of_slora_are_the_base_and_six_products_per_active_block(active: int, blocks: int) -> None:
    # S, its update, T, dx, dA and dB: three with K and three with the block's outputs.
    expected = 2 * 2 * M * N * K + active * (3 * 2 * M * R * K + 3 * 2 * M * R * (N // blocks))
    assert _counted("slora, torch", active, blocks) == expected
    assert 4 * M * N * K + counting.lora_flops(M, N, K, R, active, active / blocks) == expected


def test_flops_of_the_other_ways_are_their_closed_forms() -> None:
    base, wide, narrow = 2 * M * N * K, 2 * M * R * K, 2 * M * R * N
    assert _counted(FROZEN) == 2 * base
    assert _counted("full") == 3 * base
    assert _counted("PEFT") == 2 * base + 3 * wide + 3 * narrow
    # It saves x only and computes S again.
    assert _counted("addmm function") == 2 * base + 4 * wide + 3 * narrow


@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp"])
def test_flops_of_a_transformers_step_are_their_closed_form(precision: str) -> None:
    pytest.importorskip("timm")
    batch, tokens, width, depth, rank = 2, 5, 24, 3, training.RANK
    M, model = batch * tokens, models.MODELS["tiny"]()
    layers = [(3 * width, width, 3), (width, width, 1), (4 * width, width, 1), (width, 4 * width, 1)]
    head, attention = 2 * batch * width * 100, depth * 4 * batch * tokens * tokens * width
    linears = depth * sum(2 * M * N * K for N, K, _ in layers)
    # Four patches of 8 x 8 in three colours.
    forward = 2 * batch * 4 * width * 3 * 8 * 8 + linears + attention + head
    # The first layer's input needs no gradient; S, T, dx, dA and dB make six products.
    limit = forward + linears - 2 * M * 3 * width * width + 5 * attention // 2 + 2 * head
    update = depth * sum(counting.lora_flops(M, N, K, rank, blocks, 1.0) for N, K, blocks in layers)
    for name, expected in (
        ("head only", forward + head),
        ("frozen, dx everywhere", limit),
        ("slora, all active", limit + update - 3 * 2 * M * rank * width),
    ):
        run = training.Run(training.TRAINING[name], model, precision, "cpu", "eager")
        inputs = model.inputs(batch, "cpu", run.dtype)
        run(inputs)
        assert count_flops(run, inputs) == expected


def test_bytes_beyond_a_frozen_layer_are_those_of_the_table() -> None:
    # In bytes of a 16-bit dtype: (MK, MN), from the table in the design.
    table = {"frozen": (0, 0), "eager": (12, 20), "addmm": (8, 8), "precomputed": (4, 4), "fused": (2, 2)}
    frozen = counting.bytes_moved("frozen", M, N, K, 2)
    assert frozen == 2 * 2 * (M * K + N * K + M * N)
    for algorithm, (mk, mn) in table.items():
        assert counting.bytes_moved(algorithm, M, N, K, 2) - frozen == mk * M * K + mn * M * N
        assert counting.bytes_moved(algorithm, M, N, K, 2, share=0.0) == frozen
    assert counting.bytes_moved("full", M, N, K, 2) - frozen == 2 * (M * K + M * N + N * K)
    # The algorithms of forward and backward are counted apart.
    fused, after = (counting.bytes_moved(name, M, N, K, 2) for name in ("fused", "cublas_after"))
    both = [counting.bytes_moved(name, M, N, K, 2) for name in ("fused/cublas_after", "cublas_after/fused")]
    assert sum(both) == fused + after
    assert both[0] != both[1]


def test_times_are_set_beside_the_roofline() -> None:
    roofline = {"gemm_flops_per_s": {"fp32": 100.0}, "copy_bytes_per_s": 10.0}
    assert counting.beside_roofline(roofline, "fp32", 2.0, 50, 10) == {
        "flops_per_s": 25.0, "percent_of_gemm": 25.0, "percent_of_copy": 50.0,
    }  # fmt: skip
    assert counting.beside_roofline(roofline, "fp16", 2.0, 50, None) == {"flops_per_s": 25.0}
