"""Terms on the matrices of the blocks: each is its formula, and so is each gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import slora
from slora import ConfigError, StateError
from slora.layers import adapted_layers
from slora.retention import EWC, L2, Distillation, LocalDrift, Replay, Term, feature_drift
from tests.retention.conftest import Made, Net, inputs, updates


def term_of(name: str, model: Net, samples: Tensor) -> Term:
    if name == "l2":
        return L2(model, 0.7)
    if name == "drift":
        return LocalDrift(model, samples, 0.7, rows=100)
    return EWC(model, samples, 0.7, features=model.features)


def dense(name: str, model: Net, samples: Tensor, on: str) -> Tensor:
    """The term from `B A` and `S B^T` formed in full; the Fisher of this model by hand."""
    active = [block for block, flag in zip(("q", "k", "v", "proj"), on, strict=True) if flag == "1"]
    D = updates(model)
    if name == "l2":
        return 0.7 * sum(((D[block] ** 2).sum() for block in active), torch.zeros(()))
    X = inputs(model, samples)
    rows = {"q": slice(0, 8), "k": slice(8, 16), "v": slice(16, 24)}
    if name == "drift":
        total = torch.zeros((), dtype=torch.float64)
        for block in active:
            x, W = (X["proj"], model.proj.weight) if block == "proj" else (X["qkv"], model.qkv.weight[rows[block]])
            S = x @ (model.proj.lora_A[0] if block == "proj" else model.qkv.lora_A["qkv".index(block)]).T
            B = model.proj.lora_B[0] if block == "proj" else model.qkv.lora_B["qkv".index(block)]
            moved = 1.5 * S @ B.T
            total = total + (moved**2).sum() / ((x @ W.T) ** 2).sum()
        return 0.7 * total
    f = X["proj"] @ model.proj.weight.T + model.proj.bias
    scale = ((f - f.mean(0)) ** 2).sum(1).mean()
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64)
    for i, x in enumerate(samples):
        sign = torch.randint(2, (1, 6), generator=generator)[0] * 2.0 - 1
        q, k, v = (x @ model.qkv.weight.T + model.qkv.bias).chunk(3)
        # d (v^T f) / d (input of the tanh), and by the outputs of the projections.
        back = (sign.double() @ model.proj.weight) * (1 - torch.tanh(q * k + v) ** 2)
        by = {"q": back * k, "k": back * q, "v": back}
        for block in active:
            grad = torch.outer(sign.double(), X["proj"][i]) if block == "proj" else torch.outer(by[block], x)
            total = total + (grad.detach() ** 2 / scale.detach() * D[block] ** 2).sum() / len(samples)
    return 0.7 * total


@pytest.mark.parametrize("on", ["1111", "0110", "1001", "0000"])
@pytest.mark.parametrize("name", ["l2", "drift", "ewc"])
def test_a_term_is_what_its_formula_gives_on_dense_matrices(name: str, on: str, make: Made, samples: Tensor) -> None:
    model = make(on)
    value = term_of(name, model, samples)()
    expected = dense(name, model, samples, on)
    # Sums of at most 240 fp64 products.
    torch.testing.assert_close(value, expected.to(value.dtype), rtol=1e-12, atol=1e-14)
    if on == "0000":
        assert not value.requires_grad
        return
    parameters = [model.qkv.lora_A, model.qkv.lora_B, model.proj.lora_A, model.proj.lora_B]
    got = torch.autograd.grad(value, parameters, allow_unused=True)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["l2", "drift", "ewc"])
def test_its_gradients_are_those_of_finite_differences(name: str, make: Made, samples: Tensor) -> None:
    model = make("1011")
    term = term_of(name, model, samples)

    def of(A: Tensor, B: Tensor) -> Tensor:
        model.qkv.lora_A.data, model.qkv.lora_B.data = A.detach(), B.detach()
        value = term()
        dA, dB = torch.autograd.grad(value, [model.qkv.lora_A, model.qkv.lora_B])
        # A scalar with the term's own gradient, for gradcheck's differences.
        return value.detach() + ((A - A.detach()) * dA).sum() + ((B - B.detach()) * dB).sum()

    A, B = (p.detach().clone().requires_grad_() for p in (model.qkv.lora_A, model.qkv.lora_B))
    assert torch.autograd.gradcheck(of, (A, B))


@pytest.mark.parametrize("name", ["l2", "drift", "ewc"])
def test_rank_gates_are_a_part_of_the_update(name: str, make: Made, samples: Tensor) -> None:
    model, folded = make(), make()
    factors = torch.tensor([[0.5, 0.0], [2.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    model.qkv.add_rank_gate().data.copy_(factors)
    folded.qkv.lora_B.data.mul_(factors[:, None])
    value = term_of(name, model, samples)()
    torch.testing.assert_close(value, term_of(name, folded, samples)(), rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(value, [model.qkv.rank_gate])
    assert grad.ne(0).any()


def test_gates_get_no_gradient(make: Made, samples: Tensor) -> None:
    model = make()
    for name in ("l2", "drift", "ewc"):
        term_of(name, model, samples)().backward()
    assert model.qkv.gate.grad is None


@pytest.mark.parametrize("name", ["l2", "drift", "ewc"])
def test_under_autocast_a_term_stays_fp32(name: str, make: Made, samples: Tensor) -> None:
    model = make(dtype=torch.float32)
    term = term_of(name, model, samples.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(term(), term())
        value = term()
    assert torch.equal(value, term())


def test_drift_of_each_block_is_logged_and_that_of_inactive_ones_is_zero(make: Made, samples: Tensor) -> None:
    model = make("1011")
    drift = LocalDrift(model, samples, rows=100)
    found = drift.per_block()
    alone = [dense("drift", make(on), samples, on).item() / 0.7 for on in ("1000", "0010", "0001")]
    assert found["qkv"].tolist() == pytest.approx([alone[0], 0, alone[1]], rel=1e-12)
    assert found["proj"].tolist() == pytest.approx([alone[2]], rel=1e-12)
    assert drift.per_block(every_block=True)["qkv"][1] > 0
    assert drift().item() == pytest.approx(sum(alone), rel=1e-12)


def test_feature_drift_is_that_of_one_block_alone_and_leaves_the_gates(make: Made, samples: Tensor) -> None:
    model = make("1101")
    before = [gate.clone() for gate in (model.qkv.gate, model.proj.gate)]
    found = feature_drift(model, samples, features=model.features)
    assert all(map(torch.equal, before, (model.qkv.gate, model.proj.gate)))
    X, D = inputs(model, samples), updates(model)
    f = X["proj"] @ model.proj.weight.T + model.proj.bias
    scale = ((f - f.mean(0)) ** 2).sum(1).mean()
    q, k, v = (samples @ model.qkv.weight.T + model.qkv.bias).chunk(3, -1)
    for name, moved in (
        ("q", torch.tanh((q + samples @ D["q"].T) * k + v) @ model.proj.weight.T),
        ("k", torch.tanh(q * (k + samples @ D["k"].T) + v) @ model.proj.weight.T),
        ("proj", X["proj"] @ (model.proj.weight + D["proj"]).T),
    ):
        expected = ((moved + model.proj.bias - f) ** 2).sum(1).mean() / scale
        ours = found["proj"][0] if name == "proj" else found["qkv"]["qk".index(name)]
        torch.testing.assert_close(ours, expected.detach(), rtol=1e-12, atol=0)
    assert found["qkv"][2] == 0
    assert feature_drift(model, samples, features=model.features, every_block=True)["qkv"][2] > 0


def test_rows_are_drawn_from_all_samples_and_the_layers_are_left_as_they_were(make: Made, samples: Tensor) -> None:
    model = make()
    before = dict(model.qkv.__dict__)
    drift = LocalDrift(model, samples, rows=4)
    again = LocalDrift(model, samples, rows=4)
    x = drift.rows["qkv"][0, 3].x
    assert x.shape == (4, 8)
    assert all(any(torch.equal(row, sample) for sample in samples) for row in x)
    assert torch.equal(x, again.rows["qkv"][0, 3].x)
    assert dict(model.qkv.__dict__) == before
    assert not model.qkv.weight.requires_grad


def test_drift_of_attention_with_three_inputs_has_rows_for_each(samples: Tensor) -> None:
    class Cross(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x.view(-1, 5, 8)
            out: Tensor = self.attn(x, 2 * x, 3 * x)[0]
            return out

    torch.manual_seed(0)
    model = slora.inject(Cross().double(), slora.SelectiveLoRAConfig(r=2))
    drift = LocalDrift(model, samples, rows=100)
    rows = drift.rows["attn"]
    assert {blocks: len(entry.x) for blocks, entry in rows.items()} == {(0, 1): 10, (1, 2): 10, (2, 3): 10}
    # The rows are in another order.
    torch.testing.assert_close(2 * rows[0, 1].x.sum(0), rows[1, 2].x.sum(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(3 * rows[0, 1].x.sum(0), rows[2, 3].x.sum(0), rtol=1e-12, atol=1e-14)


def test_ewc_is_distillation_to_second_order_where_the_features_are_diagonal(samples: Tensor) -> None:
    # One output per weight: F is then the whole curvature, and the features are linear in the weights.
    class One(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = torch.nn.Linear(1, 4), torch.nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    torch.manual_seed(0)
    model = slora.inject(One(), slora.SelectiveLoRAConfig(r=1, modules_to_save=["head"]))
    torch.nn.init.normal_(model.body.lora_B)
    x = samples[:, :1].float()
    ewc, distilled = EWC(model, x), Distillation(model, x, 1.0, batch_size=10, every=1)
    torch.testing.assert_close(ewc(), distilled(), rtol=1e-5, atol=0)


def test_replay_is_the_cross_entropy_of_the_old_head(make: Made, samples: Tensor) -> None:
    model = make()
    head = torch.nn.Linear(6, 4).double()
    labels = torch.arange(10) % 4
    term = Replay(model, samples, labels, 0.5, predict=lambda z: head(model.features(z)), batch_size=10, every=1)
    logits = head(model.features(samples))
    expected = 0.5 * (logits.logsumexp(1) - logits[torch.arange(10), labels]).mean()
    torch.testing.assert_close(term().double(), expected, rtol=1e-6, atol=0)
    term().backward()
    assert model.qkv.lora_A.grad is not None


def test_replay_takes_every_sample_in_turn_with_its_own_label(make: Made, samples: Tensor) -> None:
    model, seen = make(), []

    def predict(z: Tensor) -> Tensor:
        seen.append(z)
        return torch.zeros(len(z), 10)

    term = Replay(model, samples, torch.arange(10), predict=predict, batch_size=5, every=2)
    seen.clear()
    values = [term(step).item() for step in range(4)]
    assert values[1] == values[3] == 0
    assert values[0] == pytest.approx(2 * math.log(10))
    assert {tuple(row.tolist()) for row in torch.cat(seen)} == {tuple(row.tolist()) for row in samples}


@pytest.mark.parametrize(
    ("make_term", "message"),
    [
        (lambda m, x: L2(m, -1), "weight=-1 is negative"),
        (lambda m, x: L2(m, math.inf), "weight=inf is negative or not a finite"),
        (lambda m, x: L2(m, True), "weight=True is negative or not a finite number"),
        (lambda m, x: L2(m, 1, every=0), "every=0 is not a positive integer"),
        (lambda m, x: LocalDrift(m, x, rows=0), "rows=0 is not a positive integer"),
        (lambda m, x: LocalDrift(m, x, seed="a"), "seed='a' is not an integer"),
        (lambda m, x: Distillation(m, x, seed=0.5), "seed=0.5 is not an integer"),
        (lambda m, x: LocalDrift(m, x.half()), "samples are torch.float16, which the model does not take"),
        (lambda m, x: LocalDrift(m, x[:0]), "samples holds 0 samples, fewer than 2"),
        (lambda m, x: LocalDrift(m, x, run=lambda z: z), "samples reach no adapted layer"),
        (lambda m, x: EWC(m, x[:1]), "samples holds 1 samples, fewer than 2"),
        (lambda m, x: EWC(m, x, features=lambda z: z), "do not depend on any adapted weight"),
        (lambda m, x: EWC(m, x, features=lambda z: z[:, :, None]), r"features have shape \[10, 8, 1\]"),
        (
            lambda m, x: Replay(m, x, torch.zeros(9).long()),
            r"labels are torch.int64 \[9\], expected torch.int64 \[10\]",
        ),
        (lambda m, x: Replay(m, x, torch.zeros(10)), r"labels are torch.float32 \[10\], expected torch.int64"),
        (lambda m, x: Replay(m, x, torch.full((10,), 3)), "labels go from 3 to 3, but the head has 3 outputs"),
        (lambda m, x: Replay(m, x, torch.zeros(10).long(), predict=3), "predict=3 is not a function"),
        (lambda m, x: Replay(m, x, torch.zeros(10).long(), predict=lambda z: z[0]), r"logits of 2 samples have shape"),
        (lambda m, x: L2(torch.nn.Linear(2, 2)), "no adapted layer, so the term 'l2'"),
    ],
)
def test_bad_input_is_refused_by_name(
    make_term: Callable[[Any, Tensor], Term], message: str, make: Made, samples: Tensor
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_term(make(), samples)


@pytest.mark.parametrize("step", [-1, 0.5, True])
def test_a_step_that_is_no_number_of_a_step_is_refused(step: Any, make: Made) -> None:
    with pytest.raises(ConfigError, match=f"step={step} is not"):
        L2(make())(step)


@pytest.mark.parametrize("kind", [LocalDrift, EWC, Distillation])
def test_a_sample_that_is_not_finite_is_named(kind: Callable[..., Term], make: Made, samples: Tensor) -> None:
    samples[3, 2] = math.nan
    with pytest.raises(ConfigError, match=r"samples\[3\] holds NaN or infinity"):
        kind(make(), samples)


def test_rows_that_a_layer_makes_infinite_are_named_by_the_layer(make: Made, samples: Tensor) -> None:
    model = make()
    # tanh of it is NaN.
    model.qkv.bias.data[0], model.qkv.bias.data[8] = math.inf, 0
    samples[0] = 0
    model.qkv.weight.data[8] = 0
    with pytest.raises(ConfigError, match="the input of 'proj' holds NaN or infinity in the base model"):
        LocalDrift(model, samples, rows=100)


def test_a_merged_model_is_refused(make: Made, samples: Tensor) -> None:
    model = make()
    slora.merge(model)
    for name in ("drift", "ewc"):
        with pytest.raises(StateError, match="merged"):
            term_of(name, model, samples)


def test_terms_of_many_layers_leave_the_base_frozen(make: Made, samples: Tensor) -> None:
    model = make()
    for name in ("drift", "ewc"):
        term_of(name, model, samples)
    assert not any(
        layer.base_weight.requires_grad or layer.base_weight.grad is not None for _, layer in adapted_layers(model)
    )
