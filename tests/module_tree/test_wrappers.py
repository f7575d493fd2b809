"""A model in a wrapper, or with wrapped parts, is to slora the model that is in it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slora
from slora.errors import StateError
from slora.gates.values import gates
from slora.layers import SelectiveLoRALinear, adapted_layers
from slora.models.features import final_features
from slora.module_tree.wrappers import named_modules, named_parameters, state_of

Wrap = Callable[[nn.Module], nn.Module]


def _compile(module: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(module, backend="eager")
    return compiled  # type: ignore[no-any-return]


def _compile_block(model: nn.Module) -> nn.Module:
    model.blocks[0] = _compile(model.blocks[0])
    return model


def _compile_leaves(model: nn.Module) -> nn.Module:
    model.blocks[1].mlp[0] = _compile(model.blocks[1].mlp[0])
    model.head = _compile(model.head)
    return model


def _compile_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    model.blocks[0].compile(backend="eager")
    model.blocks[1].mlp[2].compile(backend="eager")
    return model


def _checkpoint(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    model.blocks[1].qkv = checkpoint_wrapper(model.blocks[1].qkv)
    return model


def _parallel_part(model: nn.Module) -> nn.Module:
    model.blocks = nn.DataParallel(model.blocks)
    return model


def _accelerate(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    # One state per process, which a test before may have made with other settings.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)


def _regions(model: nn.Module) -> nn.Module:
    utils = pytest.importorskip("accelerate.utils")
    return utils.compile_regions(model, backend="eager")


def _ema(name: str) -> Wrap:
    return lambda model: getattr(pytest.importorskip("timm.utils"), name)(model)


WRAPPERS: dict[str, Wrap] = {
    "torch.compile": _compile,
    "a compiled block": _compile_block,
    "compiled leaves": _compile_leaves,
    "compiled in place": _compile_in_place,
    "compiled regions": _regions,
    "checkpointed": _checkpoint,
    "DataParallel": nn.DataParallel,
    "a parallel part": _parallel_part,
    "DDP": lambda model: nn.parallel.DistributedDataParallel(model, find_unused_parameters=True),
    "DDP of compiled": lambda model: nn.parallel.DistributedDataParallel(_compile(model), find_unused_parameters=True),
    "accelerate": _accelerate,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "ModelEmaV2": _ema("ModelEmaV2"),
    "ModelEmaV3": _ema("ModelEmaV3"),
    "two at once": lambda model: nn.DataParallel(_compile(_checkpoint(model))),
}
COPIES = ("AveragedModel", "ModelEmaV2", "ModelEmaV3")
CONFIG = slora.SelectiveLoRAConfig(r=2, modules_to_save=["head", "blocks.0.norm", "shift"])


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)
    torch.distributed.destroy_process_group()
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        y: Tensor = self.mlp(x + torch.sigmoid(q * k) * v)
        return x + y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(8))
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(x + self.shift))
        return y


@pytest.fixture
def plain() -> nn.Module:
    return Net()


@pytest.fixture
def model(plain: nn.Module, randomise: Any) -> nn.Module:
    """A trained model: one block of the first qkv and one layer are off."""
    model: Any = randomise(slora.inject(copy.deepcopy(plain), CONFIG))
    with torch.no_grad():
        model.blocks[0].qkv.gate[1] = 0.0
        model.blocks[1].mlp[2].gate[0] = 0.0
        for parameter in (model.shift, model.head.weight, model.blocks[0].norm.weight):
            parameter.normal_()
    return model  # type: ignore[no-any-return]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 8)


@pytest.fixture(params=WRAPPERS)
def wrapped(request: pytest.FixtureRequest, model: nn.Module) -> nn.Module:
    """The same model, wrapped; `model` itself is not touched."""
    return WRAPPERS[request.param](copy.deepcopy(model))


@pytest.fixture(params=[name for name in WRAPPERS if name not in ("two at once", "DDP of compiled")])
def running(request: pytest.FixtureRequest, model: nn.Module) -> nn.Module:
    """The same model, wrapped; `model` itself is not touched."""
    return WRAPPERS[request.param](copy.deepcopy(model))


def _assert_close(ours: Tensor, theirs: Tensor, wrapped: nn.Module) -> None:
    # A chain of ten products and sums; accelerate's wrapper runs them in bf16.
    eps = 2**-8 if hasattr(wrapped, "_original_forward") else 2**-23
    assert float((ours - theirs).detach().abs().max()) <= 10 * eps * float(theirs.detach().abs().max())


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_report_of_a_wrapped_model_has_the_names_of_the_plain_one(model: nn.Module, wrapped: nn.Module) -> None:
    active = slora.active_blocks(wrapped)
    assert {name: flags.tolist() for name, flags in active.items()} == {
        name: flags.tolist() for name, flags in slora.active_blocks(model).items()
    }
    assert slora.summary(wrapped) == slora.summary(model)
    assert torch.equal(slora.gate_penalty(wrapped), slora.gate_penalty(model))
    shapes = [
        [(group["name"], [p.shape for p in group["params"]]) for group in slora.parameter_groups(m)]
        for m in (model, wrapped)
    ]
    assert shapes[0] == shapes[1]
    assert [name for name, _ in named_modules(wrapped)] == [name for name, _ in model.named_modules()]
    assert [name for name, _ in named_parameters(wrapped)] == [name for name, _ in model.named_parameters()]
    assert list(state_of(wrapped)) == list(model.state_dict())


def test_a_wrapped_model_is_saved_as_the_plain_one_byte_for_byte(
    model: nn.Module, wrapped: nn.Module, tmp_path: Path
) -> None:
    slora.save_adapter(model, tmp_path / "plain")
    slora.save_adapter(wrapped, tmp_path / "wrapped")
    assert _files(tmp_path / "wrapped") == _files(tmp_path / "plain")


@torch.no_grad()
def test_an_adapter_loads_into_a_wrapped_model(model: nn.Module, running: nn.Module, x: Tensor, tmp_path: Path) -> None:
    expected = model(x)
    slora.save_adapter(model, tmp_path)
    with torch.no_grad():
        for p in named_parameters(running):
            if p[1].requires_grad:
                p[1].normal_()
    assert slora.load_adapter(running, tmp_path) is running
    for (name, ours), theirs in zip(state_of(running).items(), model.state_dict().values(), strict=True):
        # Blocks that are off get fresh matrices.
        assert torch.equal(ours, theirs) or "lora_" in name, name
    _assert_close(running(x), expected, running)


@torch.no_grad()
def test_a_wrapped_model_is_merged_unmerged_and_disabled(model: nn.Module, running: nn.Module, x: Tensor) -> None:
    before = state_of(copy.deepcopy(model))
    adapted = running(x)
    with slora.disabled(running) as inside:
        assert inside is running
        base = running(x)
    with slora.disabled(model):
        _assert_close(base, model(x), running)
    assert slora.merge(running) is running
    slora.merge(model)
    for (name, ours), theirs in zip(state_of(running).items(), state_of(model).values(), strict=True):
        assert torch.equal(ours, theirs), name
    _assert_close(running(x), adapted, running)
    assert slora.unmerge(running) is running
    assert all(torch.equal(value, before[name]) for name, value in state_of(running).items())
    torch.testing.assert_close(running(x), adapted, rtol=0, atol=0)


@torch.no_grad()
def test_a_wrapped_model_is_unloaded_and_given_back_without_the_outer_wrapper(
    model: nn.Module, running: nn.Module, x: Tensor
) -> None:
    # It ends with `slora.unload`, which takes the model out of its wrappers.
    running(x)
    inside = slora.merge_and_unload(running)
    assert type(inside) is Net
    expected = slora.merge_and_unload(model)
    assert list(state_of(inside)) == list(expected.state_dict())
    _assert_close(inside(x), expected(x), running)
    assert not any(isinstance(module, SelectiveLoRALinear) for module in inside.modules())


@pytest.mark.parametrize("name", [name for name in WRAPPERS if "DDP" not in name and name != "two at once"])
def test_a_wrapped_model_is_injected_as_the_plain_one(name: str, plain: nn.Module, x: Tensor, tmp_path: Path) -> None:
    wrapped = WRAPPERS[name](copy.deepcopy(plain))
    # So that what was compiled was compiled with the plain layers.
    expected = wrapped(x)
    for m in (plain, wrapped):
        torch.manual_seed(1)
        assert slora.inject(m, CONFIG) is m
        with torch.no_grad():
            for _, layer in adapted_layers(m):
                layer.lora_B.normal_(std=0.3)
    assert [n for n, _ in adapted_layers(wrapped)] == [n for n, _ in adapted_layers(plain)]
    assert float((wrapped(x) - expected).detach().abs().max()) > 0.5 * float(expected.detach().abs().max())
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "accelerate"):
        _assert_close(wrapped(x), plain(x), wrapped)
    wrapped(x).sum().backward()
    assert all(layer.lora_B.grad is not None for _, layer in adapted_layers(wrapped)) or name in COPIES
    slora.save_adapter(plain, tmp_path / "plain")
    slora.save_adapter(wrapped, tmp_path / "wrapped")
    assert _files(tmp_path / "wrapped") == _files(tmp_path / "plain")


def test_an_adapter_is_not_put_into_what_ddp_has_looked_at(plain: nn.Module, model: nn.Module, tmp_path: Path) -> None:
    slora.save_adapter(model, tmp_path)
    wrapped = nn.parallel.DistributedDataParallel(plain)
    for call in (lambda: slora.inject(wrapped), lambda: slora.load_adapter(wrapped, tmp_path)):
        with pytest.raises(slora.SLoRAError, match=r"DistributedDataParallel .* before the model is wrapped"):
            call()
    assert not list(adapted_layers(wrapped))


def test_fully_sharded_data_parallel_is_refused_with_what_to_use_instead(model: nn.Module, tmp_path: Path) -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._fsdp_wrapped_module = module

    wrapped = FullyShardedDataParallel(model)
    for call in (slora.summary, slora.merge, slora.gate_penalty, lambda m: slora.save_adapter(m, tmp_path / "a")):
        with pytest.raises(StateError, match=r"FullyShardedDataParallel keeps .*fully_shard"):
            call(wrapped)
    assert not (tmp_path / "a").exists()
    with pytest.raises(StateError, match="FullyShardedDataParallel keeps"):
        slora.summary(nn.Sequential(wrapped))


def test_a_model_of_ones_own_with_a_part_called_module_keeps_its_names(tmp_path: Path) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.module(x)
            return y

    mine = slora.inject(Mine(), slora.SelectiveLoRAConfig(r=2, target_modules=["0"]))
    assert list(slora.active_blocks(mine)) == ["module.0"]
    assert list(slora.active_blocks(nn.DataParallel(mine))) == ["module.0"]


@pytest.mark.parametrize("wrap", [lambda m: m, _compile], ids=["plain", "compiled"])
@pytest.mark.parametrize("call", [slora.merge_and_unload, slora.unload], ids=["merge_and_unload", "unload"])
def test_an_adapted_layer_by_itself_cannot_be_unloaded_in_place(call: Any, wrap: Wrap) -> None:
    layer = SelectiveLoRALinear(4, 4, r=2)
    nn.init.normal_(layer.lora_B)
    weight = layer.weight.clone()
    with pytest.raises(StateError, match=r"itself an adapted layer.*fuse"):
        call(wrap(layer))
    assert torch.equal(layer.weight, weight)


def test_strategies_choose_in_a_wrapped_model(wrapped: nn.Module) -> None:
    slora.keep_blocks(wrapped, 2)
    assert slora.summary(wrapped).active == 2
    slora.freeze_gates(wrapped)
    assert not any(gate.requires_grad for gate in gates(wrapped))


def test_the_head_and_the_features_of_a_wrapped_model_are_found(
    running: nn.Module, model: nn.Module, x: Tensor
) -> None:
    with torch.no_grad():
        expected = final_features(model)(x)
        _assert_close(final_features(running)(x), expected, running)


@pytest.mark.parametrize("name", ["compiled leaves", "checkpointed", "DataParallel"])
def test_a_new_head_of_a_wrapped_model_is_trained_first(name: str, model: nn.Module, x: Tensor) -> None:
    training = pytest.importorskip("slora.training")
    wrapped = WRAPPERS[name](copy.deepcopy(model))
    batches = [(x, torch.tensor([0, 1, 2]))]
    for m in (model, wrapped):
        training.train_head(m, batches, steps=2, criterion=nn.functional.cross_entropy)
    ours = dict(named_parameters(wrapped))
    for key, theirs in model.named_parameters():
        torch.testing.assert_close(ours[key], theirs, msg=key)


@pytest.mark.parametrize("name", ["a compiled block", "checkpointed", "DataParallel"])
def test_a_run_of_a_wrapped_model_is_resumed_by_the_plain_one(name: str, model: nn.Module, tmp_path: Path) -> None:
    training = pytest.importorskip("slora.training")
    settings = training.TrainSettings(max_steps=4, batch_size=2, save_every=2, keep_last=2, budget=2)
    data = torch.randn(6, 8), torch.arange(6) % 5
    twin = copy.deepcopy(model)
    wrapped = WRAPPERS[name](copy.deepcopy(model))
    training.train(wrapped, data, settings=settings, run_dir=tmp_path)
    (first, _) = sorted(path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith("step-"))
    training.train(twin, data, settings=settings, resume=first)
    # A graph gives matrices of blocks that are off zeros for a gradient, with which momentum moves them.
    off = {key for key, flags in slora.active_blocks(twin).items() if not flags.any()}
    ours = dict(named_parameters(twin))
    for key, theirs in named_parameters(wrapped):
        if name != "a compiled block" or key.rpartition(".")[0] not in off:
            torch.testing.assert_close(ours[key], theirs, msg=key)
