"""Weights read past their layer in compiled, recomputed and recorded modules."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slora
from slora.errors import StateError, TargetError
from tests.layers.weight_readers import E, Holds, Transposed, inputs, model_of, project, randomised


@pytest.mark.parametrize("how", ["linear_with_another_bias", "called_and_read", "in_chunks", "in_attention"])
def test_compiled_readers_have_one_graph_and_the_same_results(how: str) -> None:
    torch._dynamo.reset()
    model, x = randomised(model_of(how)), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    leaves = [p for p in model.parameters() if p.requires_grad]
    y, expected = compiled(x), model(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    found, wanted = (torch.autograd.grad(out.sum(), leaves, allow_unused=True) for out in (y, expected))
    for one, two in zip(found, wanted, strict=True):
        if two is not None and one is not None:
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        else:
            assert all(grad is None or not grad.any() for grad in (one, two))
    torch._dynamo.reset()


@pytest.mark.parametrize("fullgraph", [True, False])
def test_what_torch_compile_does_not_show_is_refused_there(fullgraph: bool) -> None:
    torch._dynamo.reset()
    model, x = randomised(model_of("transposed_attribute")), inputs()
    with pytest.raises(Exception, match=r"does not show what is done with an attribute of the weight of '1.q'"):
        torch.compile(model, fullgraph=fullgraph, backend="eager")(x)
    assert torch.isfinite(model(x)).all()
    torch._dynamo.reset()


class Fails(Holds):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.q.weight
        raise ValueError(F.linear(x, weight).shape)


class Breaks(Holds):
    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.q.weight)
        torch._dynamo.graph_break()
        return F.linear(x, self.q.weight) + self.q(x)


class BreaksInside(Holds):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.broken(x), self.q.weight)

    def broken(self, x: Tensor) -> Tensor:
        x = self.q(x)
        torch._dynamo.graph_break()
        return x + F.linear(x, self.q.weight)


class Reads(Holds):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.q.weight, self.q.bias)


def adapted(model: nn.Module) -> nn.Module:
    return randomised(slora.inject(model, slora.SelectiveLoRAConfig(r=2, target_modules=["q"])))


@pytest.mark.parametrize(
    ("kind", "failing", "backend"),
    [
        (kind, failing, ("eager", "aot_eager")[(i + j) % 2])
        for i, kind in enumerate((Reads, Breaks, BreaksInside))
        for j, failing in enumerate((None, Fails, Transposed))
    ],
)
def test_compiled_readers_that_fail_or_break_the_graph_add_the_update_once(
    kind: type[nn.Module], failing: type[nn.Module] | None, backend: str
) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, E)
    for _ in range(2 if failing else 0):
        with pytest.raises(ValueError, match=r"Size|does not show"):
            torch.compile(adapted(failing()), backend=backend)(x)
    for model in (adapted(kind()), nn.Sequential(adapted(kind()), adapted(kind()))):
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("what", ["in place", "wrapped", "the layer"])
def test_a_compiled_part_whose_weight_is_read_from_outside_is_refused_unless_all_is_compiled(what: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Reads()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x) + self.part.q(x) + F.linear(x, self.part.q.weight)

    torch._dynamo.reset()
    model, x = adapted(Outer()), torch.randn(3, E)
    expected = model(x)
    if what == "wrapped":
        model.part = torch.compile(model.part, backend="eager")
    else:
        (model.part if what == "in place" else model.part.q).compile(backend="eager")
    with pytest.raises(TargetError, match=r"'Outer' reads the weight of 'part.q', .* compile 'Outer' as a whole"):
        model(x)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x), expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


class Recomputes(Holds):
    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.kept = self.inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.q.weight)) * project(self.q, x)

    def encode(self, x: Tensor) -> Tensor:
        return F.linear(x, self.q.weight)

    def reset(self) -> None:
        nn.init.ones_(self.q.weight.data)


@pytest.mark.parametrize("call", ["checkpoint", "reentrant checkpoint", "inner", "kept", "encode", "pickled"])
def test_methods_that_read_learn_where_they_are_called_by_themselves(call: str) -> None:
    model, x = adapted(Recomputes()), torch.randn(3, E, requires_grad=True)
    layer = model.q
    weight = layer.weight + layer.scaling * (layer.lora_B @ layer.lora_A).flatten(0, 1)
    expected = F.linear(x, weight)
    if call != "encode":
        expected = torch.tanh(expected) * F.linear(x, weight, layer.bias)
    wanted = torch.autograd.grad(expected.sum(), [layer.lora_A, layer.lora_B])
    if call == "pickled":
        model = pickle.loads(pickle.dumps(model))
        layer = model.q
    model.reentrant = call == "reentrant checkpoint"
    y = {"inner": model.inner, "kept": model.kept, "encode": model.encode}.get(call, model)(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.lora_B.grad, wanted[1], rtol=1e-4, atol=1e-5)
    model.reset()
    assert (layer.weight == 1).all()
    assert "kept" not in vars(slora.unload(model)) or model.kept.__func__ is Recomputes.inner


def test_a_compiled_reader_that_reads_in_methods_is_one_graph() -> None:
    class Calls(Recomputes):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.encode(x)

    torch._dynamo.reset()
    model, x = adapted(Calls()), torch.randn(3, E)
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(x), model(x), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_the_refusal_of_16_bits_names_all_layers_that_the_module_reads() -> None:
    class Two(Holds):
        def __init__(self) -> None:
            super().__init__()
            self.k = nn.Linear(E, E)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.q.weight.t() + x @ self.k.weight.t()

    model = slora.inject(Two().bfloat16(), slora.SelectiveLoRAConfig(r=2))
    with pytest.raises(TargetError, match=r"list 'q' in exclude_modules; the same module also reads 'k'$"):
        model(torch.randn(3, E, dtype=torch.bfloat16))


def test_a_reader_is_recorded_as_one_call_and_refused_as_the_whole_of_a_recording() -> None:
    model, x = adapted(Reads()), torch.randn(3, E)
    with pytest.raises(
        StateError, match=r"torch.fx cannot record Reads, .* call slora.merge_and_unload\(model\) first"
    ):
        torch.fx.symbolic_trace(model)
    outer = nn.Sequential(model)
    assert torch.equal(torch.fx.symbolic_trace(outer)(x), outer(x))
