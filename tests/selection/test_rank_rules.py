"""Each rank-wise strategy against its published rule, computed here on its own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import slora
from slora.layers import adapted_layers
from slora.selection import AdaLoRA, CoDyRA, IncreLoRA, SoRA
from slora.selection.ranks import soft_threshold

Pair = tuple[Tensor, Tensor]
NAMES = ("0", "2")


def adapted(r: int = 4, blocks: int = 1) -> nn.Module:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    config = slora.SelectiveLoRAConfig(r=r, lora_alpha=2 * r, blocks=blocks, target_modules=list(NAMES))
    return slora.inject(net, config).double()


@pytest.fixture
def data() -> Pair:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(16, 6, generator=generator).double(), torch.randint(6, (16,), generator=generator)


def loss_of(model: nn.Module, data: Pair) -> Tensor:
    return F.cross_entropy(model(data[0]), data[1])


def soft(values: np.ndarray[Any, Any], threshold: float) -> np.ndarray[Any, Any]:
    return np.sign(values) * np.maximum(np.abs(values) - threshold, 0)


def test_sora_takes_a_gradient_step_and_then_the_proximal_step_of_its_constants(data: Pair) -> None:
    model = adapted()
    selection = SoRA(model, None, 30)
    optimizer = torch.optim.SGD(slora.parameter_groups(model, lr=0.3))
    for _ in range(selection.last):
        g = selection.values().numpy()
        penalty = selection.penalty()
        assert torch.as_tensor(penalty).item() == pytest.approx(1e-3 * np.abs(g).mean(), rel=1e-12)
        (loss_of(model, data) + penalty).backward()
        grads = torch.cat([layer.rank_gate.grad.flatten() for _, layer in adapted_layers(model)])  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        selection.step()
        np.testing.assert_allclose(selection.values().numpy(), soft(g - 0.3 * grads.numpy(), 1e-3), rtol=1e-12)
    assert selection.penalty() == 0.0


def test_sora_removes_without_a_budget_what_its_threshold_has_made_zero(data: Pair) -> None:
    model = adapted()
    selection = SoRA(model, None, 30, threshold=0.05, penalty=0.0)
    optimizer = torch.optim.SGD(slora.parameter_groups(model, lr=1e-6))
    start = selection.values()
    for _ in range(30):
        loss_of(model, data).backward()
        optimizer.step()
        optimizer.zero_grad()
        selection.step()
    selection.finish()
    expected = int((start.abs() > 0.05 * 20).sum())
    assert 0 < expected < 8
    assert sum(sum(layer.block_ranks()) for _, layer in adapted_layers(model)) == expected


@given(
    values=st.lists(st.floats(-3, 3).map(lambda v: round(v, 3)), min_size=1, max_size=12),
    threshold=st.floats(0, 4),
    keep=st.integers(0, 12),
)
def test_a_soft_threshold_is_the_proximal_step_as_far_as_the_budget_allows(
    values: list[float], threshold: float, keep: int
) -> None:
    keep = min(keep, len(values))
    found = soft_threshold(torch.tensor(values, dtype=torch.float64), threshold, keep).numpy()
    full = soft(np.array(values), threshold)
    if np.count_nonzero(full) >= keep:
        np.testing.assert_allclose(found, full, atol=1e-12)
        return
    assert np.count_nonzero(found) >= min(keep, np.count_nonzero(values))
    # Cut as late as the budget allows: at a value that takes the next smaller ones with it.
    cut = np.sort(np.abs(values))[::-1][keep - 1]
    assert all(abs(after) < 1e-12 for before, after in zip(values, found, strict=True) if abs(before) < cut)


def test_codyra_is_dense_first_and_then_raises_its_threshold_over_fifty_levels(data: Pair) -> None:
    model = adapted()
    selection = CoDyRA(model, None, 300)
    assert (selection.first, selection.last) == (100, 200)
    levels = np.linspace(0, 0.005, 50)
    g = selection.values().numpy()
    for step in range(1, 201):
        selection.step()
        if step > 100:
            g = soft(g, levels[min(49, (step - 100) // 2)])
        np.testing.assert_allclose(selection.values().numpy(), g, atol=1e-12)
    assert selection.level() == pytest.approx(0.005)


def peft_importance(allocator: Any, name: str) -> np.ndarray[Any, Any]:
    """The importance of the triplets of a layer, of the means that PEFT's allocator keeps."""
    scores = {
        part: (allocator.exp_avg_ipt[key] * allocator.exp_avg_unc[key]).detach().numpy()
        for part in "ABE"
        for key in [f"{name}.lora_{part}.default"]
    }
    return scores["E"][:, 0] + scores["A"].mean(1) + scores["B"].mean(0)


def test_adalora_allocates_as_peft_does(data: Pair) -> None:
    """The same triplets of the same sizes and gradients, step for step, by PEFT's allocator and by ours."""
    peft = pytest.importorskip("peft")
    from peft.tuners.adalora.layer import RankAllocator

    model = adapted()
    steps = 20
    selection = AdaLoRA(model, 3, steps, warmup=0.2, settling=0.4)
    torch.manual_seed(5)
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    first, last = selection.first, selection.last
    config = peft.AdaLoraConfig(
        init_r=4, target_r=1.5, tinit=first, tfinal=steps - last, total_step=steps, target_modules=list(NAMES)
    )
    theirs = peft.get_peft_model(plain, config).double()
    allocator = RankAllocator(theirs, config, "default")
    named = dict(theirs.named_parameters())
    optimizer = torch.optim.AdamW(slora.parameter_groups(model, lr=0.02))
    for step in range(1, steps + 1):
        loss_of(model, data).backward()
        for name, layer in adapted_layers(model):
            parts = {"lora_A": layer.lora_A, "lora_B": layer.lora_B, "lora_E": layer.rank_gate}
            for key, part in parts.items():
                other = named[f"base_model.model.{name}.{key}.default"]
                shape = other.shape
                assert part is not None
                assert part.grad is not None
                other.data, other.grad = part.detach()[0].reshape(shape).clone(), part.grad[0].reshape(shape).clone()
        if step <= last:
            allocator.update_ipt(theirs)
            by_hand = [peft_importance(allocator, f"base_model.model.{name}") for name in NAMES]
        optimizer.step()
        optimizer.zero_grad()
        selection.step()
        budget, masks = allocator.budget_schedule(step)
        assert budget == (8 if step <= first else max(3, int(3 + 5 * (1 - (step - first) / (last - first)) ** 3)))
        np.testing.assert_allclose(selection.importance().numpy(), np.concatenate(by_hand), rtol=1e-9)
        found = [bool(value) for value in selection.values() != 0]
        if masks and budget < 8 and step <= last:
            pattern = allocator.mask_to_budget(theirs, budget)
            expected = [on for name in NAMES for on in pattern[f"base_model.model.{name}.lora_E.default"]]
            assert found == expected
        assert sum(found) == (8 if step <= first else budget)


def test_the_orthogonality_term_is_the_mean_distance_of_p_and_q_from_orthonormal_ones() -> None:
    model = adapted(r=3, blocks=2)
    selection = AdaLoRA(model, 3, 20, orthogonality=0.5)
    norms = []
    for _, layer in adapted_layers(model):
        for A, B in zip(layer.lora_A.detach().numpy(), layer.lora_B.detach().numpy(), strict=True):
            norms += [np.linalg.norm(B.T @ B - np.eye(3)), np.linalg.norm(A @ A.T - np.eye(3))]
    assert len(norms) == 8
    assert float(selection.penalty()) == pytest.approx(0.5 * float(np.mean(norms)), rel=1e-12)


def test_increlora_grows_where_update_times_gradient_of_the_whole_matrix_is_largest(data: Pair) -> None:
    model = adapted(r=3, blocks=2)
    selection = IncreLoRA(model, 7, 40, every=4, orthogonality=0.0, warmup=0.1, settling=0.5)
    assert (selection.first, selection.last) == (4, 20)
    layers = dict(adapted_layers(model))
    start = [layer.lora_A.detach().clone() for layer in layers.values()]
    optimizer = torch.optim.AdamW(slora.parameter_groups(model, lr=0.05))
    mean, spread = np.zeros(4), np.zeros(4)
    held = [1, 1, 1, 1]
    for step in range(1, 21):
        # The updates as whole matrices, whose gradients are those of the method.
        updates = []
        for layer in layers.values():
            g = layer.rank_gate
            assert g is not None
            whole = torch.cat([2.0 * layer.lora_B[i] @ torch.diag(g[i]) @ layer.lora_A[i] for i in range(2)])
            updates.append(whole.detach().requires_grad_())
        one, two = layers.values()
        hidden = F.linear(data[0], one.base_weight + updates[0], one.base_bias).relu()
        F.cross_entropy(F.linear(hidden, two.base_weight + updates[1], two.base_bias), data[1]).backward()
        sizes = []
        for update in updates:
            assert update.grad is not None
            for block in (update * update.grad).abs().detach().numpy().reshape(2, -1):
                sizes.append(block.sum() / math.sqrt(block.size))
        now = np.array(sizes)
        mean = 0.85 * mean + 0.15 * now
        spread = 0.85 * spread + 0.15 * np.abs(now - mean)
        loss_of(model, data).backward()
        optimizer.step()
        optimizer.zero_grad()
        selection.step()
        assert not any(layer.base_weight.requires_grad for layer in layers.values())
        np.testing.assert_allclose(selection.scores.score("blocks").numpy(), mean * spread, rtol=1e-9)
        if step > 4 and (step - 4) % 4 == 0:
            # Three more ranks in four rounds: 0.75 each, 4.75, 5.5, 6.25 and 7, rounded to even.
            missing = {8: 5, 12: 6, 16: 6, 20: 7}[step] - sum(held)
            for block in sorted(range(4), key=lambda i: -mean[i] * spread[i]):
                if missing and held[block] < 3:
                    held[block] += 1
                    missing -= 1
        assert selection.ranks == held
    values = selection.values().reshape(4, 3)
    assert [int((row != 0).sum()) for row in values] == held
    assert sum(held) == 7
    unused = [A[i, held[2 * j + i] + 1 :] for j, A in enumerate(start) for i in range(2)]
    after = [layer.lora_A[i, held[2 * j + i] + 1 :] for j, layer in enumerate(layers.values()) for i in range(2)]
    assert any(part.numel() for part in unused)
    assert all(torch.equal(a, b) for a, b in zip(unused, after, strict=True))


def test_increlora_trains_the_next_rank_in_advance_at_a_gate_that_is_almost_zero(data: Pair) -> None:
    model = adapted(r=3)
    selection = IncreLoRA(model, 6, 40)
    layer: Any = model[0]
    before = layer.lora_A.detach().clone()
    optimizer = torch.optim.AdamW(slora.parameter_groups(model, lr=0.05))
    for _ in range(3):
        loss_of(model, data).backward()
        optimizer.step()
        optimizer.zero_grad()
        selection.step()
    assert layer.rank_gate[0, 0].abs() > 1e-3
    assert layer.rank_gate[0, 1:].tolist() == [1e-5, 0.0]
    moved = (layer.lora_A != before).any(2)[0]
    assert moved.tolist() == [True, True, False]


def test_increlora_with_less_than_a_rank_per_block_keeps_the_blocks_of_the_highest_scores(data: Pair) -> None:
    model = adapted(r=3, blocks=2)
    selection = IncreLoRA(model, 2, 20)
    optimizer = torch.optim.AdamW(slora.parameter_groups(model, lr=0.05))
    for _ in range(selection.last):
        loss_of(model, data).backward()
        optimizer.step()
        optimizer.zero_grad()
        selection.step()
    best = selection.scores.score("blocks").topk(2).indices.tolist()
    assert [i for i, on in enumerate(torch.cat(list(slora.active_blocks(model).values()))) if on] == sorted(best)
