"""What `modules_to_save` trains in a model of 16 bits is kept in fp32."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import slora

CONFIG = slora.SelectiveLoRAConfig(r=2, target_modules=["fc"], modules_to_save=["norm", "head", "temperature"])
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Net(nn.Module):
    """A saved module in the middle, one at the end, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.fc(self.norm(self.stem(x)))) * self.temperature
        return y


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture
def model(dtype: torch.dtype) -> nn.Module:
    return slora.inject(Net().to(dtype), CONFIG)


@pytest.fixture
def x(dtype: torch.dtype) -> Tensor:
    return torch.randn(5, 6).to(dtype)


def test_what_is_trained_is_fp32_and_the_base_is_not(model: nn.Module, dtype: torch.dtype) -> None:
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else dtype), name
    assert model.norm.running_mean.dtype == torch.float32


def test_the_model_computes_what_it_did_and_in_its_dtype(dtype: torch.dtype, x: Tensor) -> None:
    model = Net().to(dtype).eval()
    with torch.no_grad():
        expected = model(x)
        exact = copy.deepcopy(model).double()(x.double())
        found = slora.inject(model, CONFIG)(x)
    assert found.dtype == expected.dtype == dtype
    # Five roundings to the dtype on the way.
    assert float((found.double() - exact).abs().max()) <= 5 * torch.finfo(dtype).eps * float(exact.abs().max())


@pytest.mark.parametrize("autocast", [False, True], ids=["pure", "autocast"])
def test_a_grad_scaler_unscales_and_small_steps_arrive(model: nn.Module, x: Tensor, autocast: bool) -> None:
    dtype = x.dtype
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    optimizer = torch.optim.SGD(slora.parameter_groups(model, lr=1e-6, gate_lr=None))
    before = model.head[1].weight.detach().clone()
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss = model(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    gradient = model.head[1].weight.grad.clone()
    assert gradient.dtype == torch.float32
    scaler.step(optimizer)
    moved = before - model.head[1].weight.detach()
    assert float(moved.abs().max()) > 0
    # One rounding of the weight in fp32, of a step that 16 bits would lose.
    torch.testing.assert_close(moved, 1e-6 * gradient, rtol=0, atol=2**-24)


def test_files_hold_fp32_and_a_merged_model_the_dtype_of_the_base(
    model: nn.Module, dtype: torch.dtype, x: Tensor, tmp_path: Path
) -> None:
    with torch.no_grad():
        model.head[1].weight.normal_()
        model.temperature.fill_(1.0001)
    slora.save_adapter(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {v.dtype for k, v in saved.items() if "tracked" not in k} == {torch.float32}
    for base in (dtype, torch.float32):
        other = slora.load_adapter(Net().to(base), tmp_path)
        assert torch.equal(other.head[1].weight, model.head[1].weight)
        assert torch.equal(other.temperature, model.temperature)
    for call in (slora.merge_and_unload, slora.unload):
        plain = call(copy.deepcopy(model))
        assert {k: v.dtype for k, v in plain.state_dict().items()} == {
            k: v.dtype for k, v in Net().to(dtype).state_dict().items()
        }
        assert plain(x).dtype == dtype
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
        assert torch.equal(plain.head[1].weight, model.head[1].weight.to(dtype))


def test_copies_and_pickles_work_by_themselves(model: nn.Module, x: Tensor) -> None:
    model.eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), model(x))
        # Cast as a whole, it is one of that dtype; the other stays what it was.
        assert twin.float()(x.float()).dtype == torch.float32
        assert model(x).dtype == x.dtype


@pytest.mark.parametrize("after", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_model_cast_after_inject_goes_on_working(model: nn.Module, after: torch.dtype) -> None:
    y = model.to(after).eval()(torch.randn(5, 6).to(after))
    assert y.dtype == after


@pytest.mark.parametrize("first", ["groups", "step"])
def test_a_model_cast_after_inject_is_said_once_to_train_saved_modules_in_16_bits(
    first: str, dtype: torch.dtype, x: Tensor
) -> None:
    model = slora.inject(Net(), CONFIG).to(dtype)
    text = rf"what modules_to_save trains is {dtype}, .* Cast it before, and modules are kept in fp32"
    if first == "groups":
        with pytest.warns(slora.NarrowParameterWarning, match=text) as seen:
            optimizer = torch.optim.SGD(slora.parameter_groups(model, lr=0.1))
    else:
        optimizer = torch.optim.SGD((p for n, p in model.named_parameters() if not n.endswith("gate")), 0.1)
        with pytest.warns(slora.NarrowParameterWarning, match=text) as seen:
            optimizer.step()
    assert [warning.filename for warning in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        slora.parameter_groups(model)


@pytest.mark.parametrize("case", ["before", "back", "frozen", "other optimizer"])
def test_saved_modules_that_lose_no_steps_are_not_warned_of(case: str, dtype: torch.dtype) -> None:
    model = slora.inject(Net().to(dtype), CONFIG) if case == "before" else slora.inject(Net(), CONFIG).to(dtype)
    if case == "back":
        model.float()
    if case == "frozen":
        for part in (model.head, model.norm):
            part.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if case == "other optimizer":
            torch.optim.SGD([model.fc.lora_A], 0.1).step()
        else:
            torch.optim.SGD(slora.parameter_groups(model)).step()


def test_a_compiled_model_takes_it_without_a_break(model: nn.Module, x: Tensor) -> None:
    model.eval()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))


def test_a_tied_weight_is_read_in_fp32_by_the_module_that_is_not_named(dtype: torch.dtype) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 8)
            self.fc = nn.Linear(8, 8)
            self.head = nn.Linear(8, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.fc(self.embed(x)))
            return y

    model = Tied().to(dtype)
    tokens = torch.arange(5)
    slora.inject(model, slora.SelectiveLoRAConfig(r=2, target_modules=["fc"], modules_to_save=["head"]))
    assert model.head.weight is model.embed.weight
    assert model.head.weight.dtype == torch.float32
    assert model(tokens).dtype == dtype
    assert slora.unload(model)(tokens).dtype == dtype


def test_a_model_in_fp32_gets_no_hook() -> None:
    model = slora.inject(Net(), CONFIG)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "bert", "timm-vit"])
def test_heads_of_models_of_16_bits_train(name: str, families: Any, dtype: torch.dtype) -> None:
    family = families[name]
    model = family.build().to(dtype)
    slora.inject(model, slora.SelectiveLoRAConfig(r=2, modules_to_save=list(family.head)))
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in family.inputs()]
    y = family.run(model, *inputs)
    assert y.dtype == dtype
    y.float().square().mean().backward()
    for p in model.get_submodule(family.head[0]).parameters():
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
