"""Steps are compared with merged weights under autograd, and one that computes something else is found in any dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import slora
from benchmarks import models
from benchmarks.contenders import model as ways
from benchmarks.contenders.exact import Truth, step_mistake
from benchmarks.contenders.step import PENALTY, Step, dtype_of
from benchmarks.results import Missing

pytest.importorskip("timm")
PRECISIONS = ["fp32", "bf16", "amp"]


def _step(name: str, precision: str, model: str = "tiny") -> tuple[Step, models.Inputs]:
    found = models.find(model)
    inputs = found.inputs(2, "cpu", dtype_of(precision))
    return Step(ways.CONTENDERS[name], found, inputs, precision, "cpu"), inputs


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", list(ways.CONTENDERS))
def test_every_way_to_train_is_right(name: str, precision: str) -> None:
    for model in ("tiny", "tiny-llama"):
        try:
            step, inputs = _step(name, precision, model)
        except Missing as reason:
            pytest.skip(str(reason))
        assert step_mistake(step, inputs) is None


def _by_hand(x: Tensor, dy: Tensor, layer: slora.SelectiveLoRALinear) -> dict[str, Tensor]:
    """From dW = dy.T x: the gradients through W + sum_i I_i c B_i A_i by block, with the penalty of the gates."""
    dW, c = dy.T @ x, layer.scaling
    n = len(dW) // layer.blocks
    found: dict[str, list[Tensor]] = {"0.lora_A": [], "0.lora_B": [], "0.gate": []}
    for i in range(layer.blocks):
        A, B, on = layer.lora_A[i].double(), layer.lora_B[i].double(), float(layer.gate[i] >= layer.threshold)
        part = dW[i * n : (i + 1) * n]
        found["0.lora_A"].append(on * c * B.T @ part)
        found["0.lora_B"].append(on * c * part @ A.T)
        found["0.gate"].append(c * (part * (B @ A)).sum() + PENALTY * layer.gate[i].double().sign() / layer.blocks)
    return {name: torch.stack(parts) for name, parts in found.items()}


def test_the_truth_is_what_the_chain_rule_gives_by_hand() -> None:
    torch.manual_seed(1)
    x, dy = torch.randn(5, 4), torch.randn(5, 6)
    model = models.Model(
        "one layer", lambda device: nn.Sequential(nn.Linear(4, 6)), lambda batch, device, dtype: (x,),
        lambda net, inputs: net(inputs[0]), lambda net, inputs: (net(inputs[0]) * dy.to(inputs[0].dtype)).sum(),
        lambda net: [], lambda net: ["0"],
    )  # fmt: skip
    net = slora.inject(model.build("cpu"), slora.SelectiveLoRAConfig(r=2, lora_alpha=3, blocks=3, inactive="exact"))
    models.randomise_updates(net)
    layer = net[0]
    assert isinstance(layer, slora.SelectiveLoRALinear)
    with torch.no_grad():
        layer.gate[1] = -0.2
    found = Truth(model, net, "fp32", "cpu").gradients((x,), wide=True)
    with torch.no_grad():
        expected = _by_hand(x.double(), dy.double(), layer)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["slora, all active", "PEFT, all"])
def test_an_update_that_is_left_out_of_one_layer_is_found_in_any_precision(name: str, precision: str) -> None:
    try:
        step, inputs = _step(name, precision)
    except Missing as reason:
        pytest.skip(str(reason))
    layer = next(module for path, module in step.net.named_modules() if path.endswith("blocks.1.mlp.fc1"))
    if name == "PEFT, all":
        base = layer.base_layer
        layer.forward = lambda x: base(x)  # type: ignore[assignment]
    else:
        layer.enabled = False  # type: ignore[assignment]
    assert step_mistake(step, inputs) is not None


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "gate"])
def test_a_gradient_that_is_not_computed_or_a_little_off_is_found(part: str) -> None:
    step, inputs = _step("slora, all active", "fp32")
    parameter = step.net.get_parameter(f"blocks.2.attn.qkv.{part}")
    hook = parameter.register_hook(lambda gradient: gradient * 1.001)
    wrong = str(step_mistake(step, inputs))
    assert ("gates and scalars" if part == "gate" else part) in wrong
    assert "is off by" in wrong
    hook.remove()
    assert step_mistake(step, inputs) is None
    parameter.requires_grad_(False)
    wrong = str(step_mistake(step, inputs))
    assert ("gates and scalars is off" if part == "gate" else f"{part} was not computed") in wrong


def test_a_policy_that_does_not_probe_is_found() -> None:
    step, inputs = _step("slora, few active, probe", "bf16")
    for _, layer in slora.layers.adapted_layers(step.net):
        layer.activity()
        layer._activity = layer._activity._replace(probe=False)  # type: ignore[union-attr]
    assert str(step_mistake(step, inputs)).startswith("gates and scalars is off by")


def test_a_compiler_computes_every_input_gradient_of_the_limit() -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    products: list[int] = []

    def counted(graph: torch.fx.GraphModule, inputs: object) -> object:
        products.append(
            sum(node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) for node in graph.graph.nodes)
        )
        return make_boxed_func(graph.forward)

    step, inputs = _step("frozen, dx everywhere", "fp32")
    torch._dynamo.reset()
    step.forward = torch.compile(step.model.loss, backend=aot_autograd(fw_compiler=counted), dynamic=False)
    assert step_mistake(step, inputs) is None
    torch._dynamo.reset()
    forward, backward = products
    # Those of the forward but for the first layer's, and the gradient of the head's weight in its place.
    assert backward == forward
