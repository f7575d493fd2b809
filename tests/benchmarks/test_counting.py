"""FLOPs as counted are those of the closed form; bytes are those of the table of costs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slora
from benchmarks import counting, models
from benchmarks.contenders import model as ways
from benchmarks.contenders import step as steps
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
    table = {"frozen": (0, 0), "eager": (12, 20), "addmm": (8, 8), "precomputed": (4, 4), "fused": (2, 2)}
    frozen = counting.bytes_moved("frozen", M, N, K, 2)
    assert frozen == 2 * 2 * (M * K + N * K + M * N)
    for form, (mk, mn) in table.items():
        assert counting.bytes_moved(form, M, N, K, 2) - frozen == mk * M * K + mn * M * N
    assert counting.bytes_moved("full", M, N, K, 2) - frozen == 2 * (M * K + M * N + N * K)


def test_forms_of_forward_and_backward_are_counted_apart() -> None:
    fused, after = (counting.bytes_moved(form, M, N, K, 2) for form in ("fused", "cublas_after"))
    both = [counting.bytes_moved(form, M, N, K, 2) for form in ("fused/cublas_after", "cublas_after/fused")]
    assert sum(both) == fused + after
    assert both[0] != both[1]


def test_an_inactive_layer_moves_what_a_frozen_one_does() -> None:
    for form in ("addmm", "fused"):
        assert counting.bytes_moved(form, M, N, K, 2, share=0.0) == counting.bytes_moved("frozen", M, N, K, 2)


def test_a_prediction_adds_bytes_and_flops_at_their_ceilings() -> None:
    ceilings = {"gemm_flops_per_s": {"fp32": 1e9}, "copy_bytes_per_s": 1e8}
    found = counting.predicted_seconds(1.0, "fused", M, N, K, R, 1, 1.0, "fp32", 4, ceilings)
    assert found == pytest.approx(1.0 + 4 * (M * K + M * N) / 1e8 + 6 * M * R * (K + N) / 1e9)


def test_percent_of_a_ceiling() -> None:
    ceilings = {"gemm_flops_per_s": {"fp32": 100.0}, "copy_bytes_per_s": 10.0}
    assert counting.beside_time(ceilings, "fp32", 2.0, 50, 10) == {
        "flops_per_s": 25.0, "percent_of_gemm": 25.0, "percent_of_copy": 50.0,
    }  # fmt: skip
    assert "percent_of_gemm" not in counting.beside_time(ceilings, "fp16", 2.0, 50, 10)
    row = {"seconds": {"median": 2.0}, "flops": 50, "compulsory_bytes": 10}
    assert counting.beside_time_of(row, ceilings, "fp32")["percent_of_copy"] == 50.0
    assert counting.beside_time_of({"seconds": {"median": 2.0}}, ceilings, "fp32") == {}


def test_the_counter_sees_products_in_place() -> None:
    y = torch.zeros(M, N)
    assert counting.flops(lambda: y.addmm_(torch.ones(M, K), torch.ones(K, N))) == 2 * M * N * K


@pytest.mark.parametrize("query_heads", [2, 6])
def test_attention_is_counted_where_heads_share_keys_and_values(query_heads: int) -> None:
    q, k, v = (torch.randn(3, heads, 5, 8, requires_grad=True) for heads in (query_heads, 2, 2))
    forward = 2 * (2 * 3 * query_heads * 5 * 5 * 8)

    def attention() -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    with torch.no_grad():
        assert counting.flops(attention) == forward
    # The scores are computed again; the gradients of q, k, v and the probabilities are a product each.
    assert counting.flops(lambda: attention().sum().backward()) == forward + 5 * forward // 2


# A model of two linear layers 20 -> 32 -> 24 without biases, on batches of 5; fp32.
IN, HIDDEN, OUT, BATCH = 20, 32, 24, 5
FIRST, SECOND = IN * HIDDEN, HIDDEN * OUT


def _counted_step(name: str, head: str | None) -> tuple[int, list[counting.Compulsory]]:
    model = models.Model(
        "two layers",
        lambda device: nn.Sequential(nn.Linear(IN, HIDDEN, bias=False), nn.Linear(HIDDEN, OUT, bias=False)),
        lambda batch, device, dtype: (torch.randn(batch, IN, dtype=dtype),),
        lambda net, inputs: net(inputs[0]),
        lambda net, inputs: net(inputs[0]).sum(),
        lambda net: ["1"],
        lambda net: ["0"],
        head=head,
    )
    step = steps.Step(ways.CONTENDERS[name], model, model.inputs(BATCH, "cpu", torch.float32), "fp32", "cpu")
    step()
    return step.counted()


def test_a_step_of_full_fine_tuning_is_its_closed_form() -> None:
    flops, (found,) = _counted_step("full", "1")
    # Forward, both weight gradients, and dx of the second layer only.
    assert flops == 2 * BATCH * (2 * (FIRST + SECOND) + SECOND)
    # x and the second weight are read again; the hidden activations are kept.
    assert found == counting.Compulsory(
        parameters=4 * (FIRST + SECOND), inputs=4 * BATCH * IN, again=4 * (BATCH * IN + SECOND),
        kept=4 * BATCH * HIDDEN, trained=4 * (FIRST + SECOND),
    )  # fmt: skip
    assert found.moved == 4 * (9 * (FIRST + SECOND) + 2 * BATCH * IN + SECOND + 2 * BATCH * HIDDEN)
    assert found.beside_inputs == 4 * (4 * (FIRST + SECOND) + BATCH * HIDDEN)


def test_a_step_of_the_head_alone_is_its_closed_form() -> None:
    flops, (found,) = _counted_step("head only", "1")
    assert flops == 2 * BATCH * (FIRST + 2 * SECOND)
    assert found == counting.Compulsory(
        parameters=4 * (FIRST + SECOND), inputs=4 * BATCH * IN, kept=4 * BATCH * HIDDEN, trained=4 * SECOND
    )


@pytest.mark.parametrize(("policy", "looks"), [("frozen", 0), ("probe", 1), ("exact", 1)])
def test_blocks_that_a_step_does_not_look_at_are_not_read(policy: str, looks: int) -> None:
    _, found = _counted_step(f"slora, few active, {policy}", None)
    gates = 2
    active, inactive = ways.RANK * (HIDDEN + OUT), ways.RANK * (IN + HIDDEN)
    read = 4 * (FIRST + SECOND + gates + active)
    assert sorted(one.parameters for one in found) == [read] * (len(found) - looks) + [read + 4 * inactive] * looks
    assert {one.trained for one in found} == {4 * (active + gates)}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp"])
def test_flops_of_a_transformers_step_are_their_closed_form(precision: str) -> None:
    pytest.importorskip("timm")
    batch, tokens, width, depth, classes, edge, r = 2, 5, 24, 3, 100, 8, ways.RANK
    M, patches = batch * tokens, 4
    model = models.find("tiny")
    inputs = model.inputs(batch, "cpu", steps.dtype_of(precision))

    def counted(name: str) -> int:
        step = steps.Step(ways.CONTENDERS[name], model, inputs, precision, "cpu")
        step()
        return step.counted()[0]

    layers = [(3 * width, width, 3), (width, width, 1), (4 * width, width, 1), (width, 4 * width, 1)]
    head = 2 * batch * width * classes
    attention = depth * 4 * batch * tokens * tokens * width
    linears = depth * sum(2 * M * N * K for N, K, _ in layers)
    forward = 2 * batch * patches * width * 3 * edge * edge + linears + attention + head
    assert counted("head only") == forward + head
    # The first layer's input needs no gradient, with or without blocks; S, T, dx, dA and dB make six products.
    first = 2 * M * (3 * width) * width
    update = depth * sum(counting.lora_flops(M, N, K, r, blocks, 1.0) for N, K, blocks in layers)
    adapted = forward + linears - first + 5 * attention // 2 + 2 * head + update - 3 * 2 * M * r * width
    assert counted("slora, all active") == adapted
    # The limit: the same without anything of the update. No dx of the first layer, but of all others.
    assert counted("frozen, dx everywhere") == forward + linears - first + 5 * attention // 2 + 2 * head


def test_a_forward_of_adapted_layers_reads_active_blocks_only() -> None:
    net = slora.inject(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), slora.SelectiveLoRAConfig(r=2)).eval()
    with torch.no_grad():
        net[1].gate.fill_(0.0)
        x = torch.randn(5, 6)
        found = counting.of_forward(net, (x,), net(x))
    # Weights, biases, the gates, and A and B of the first layer.
    parameters = 6 * 8 + 8 + 8 * 4 + 4 + 2 + 2 * (6 + 8)
    assert found == counting.Compulsory(parameters=4 * parameters, inputs=4 * 5 * 6, output=4 * 5 * 4)
    assert found.moved == found.beside_inputs + 4 * 5 * 6
