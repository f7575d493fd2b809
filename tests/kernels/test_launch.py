"""How kernels are launched: on which device, with how many programs, and how they read what they are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from slora.kernels import (
    configs,
    gate_probe,
    launch,
    linear,
    skinny,
    weight_gradients,
)  # fmt: skip
from slora.ops.backends.algorithms import Forward, InputGradient
from slora.ops.operands import LoRAOperands

CPU = torch.device("cpu")


def rows(M: int, columns: int) -> Tensor:
    """An operand without memory."""
    return torch.empty(M, columns, dtype=torch.bfloat16, device="meta")


def everything(M: int, K: int, n: int, blocks: int, r: int) -> None:
    """Launch every kernel on a layer of this shape."""
    x, dy, W, low = rows(M, K), rows(M, blocks * n), rows(blocks * n, K), rows(M, blocks * r)
    A, B = rows(blocks * r, K).view(blocks, r, K), rows(blocks * n, r).view(blocks, n, r)
    operands = LoRAOperands(A, B, torch.empty(blocks, device="meta"), 0.1, 1.0)
    R = configs.padded(r)
    if r <= configs.MAX_FUSED_RANK:
        tile = configs.gemm(90, "fused", R)[-1]
        linear.fused(x, W, None, operands, tile, forward=True)
        linear.fused(dy, W, None, operands, tile, forward=False)
    tile = configs.gemm(90, "precomputed", R)[-1]
    linear.precomputed(x, W, None, low, B, operands, tile, forward=True)
    linear.precomputed(dy, W, None, low, A.view(-1, K), operands, tile, forward=False)
    skinny.products(x, operands, forward=True)
    skinny.products(dy, operands, forward=False)
    tile = configs.weight_gradients(90, min(R, 128))[-1]
    weight_gradients.weight_gradients(x, dy, low, low, operands, (True, True, True), tile)
    gate_probe.sample_rows(x, M - 1 if M < 2**19 else 512, 0)
    gate_probe.gate_probe(dy, x, operands, 0, None)


KERNELS = {
    kernel.fn.__name__
    for kernel in (
        linear.fused_linear, linear.precomputed_linear, skinny.skinny, weight_gradients.partial_sums,
        weight_gradients.reduce, gate_probe.copy_rows, gate_probe.probe,
    )
}  # fmt: skip


@pytest.mark.parametrize(
    ("M", "K", "n", "blocks", "r"),
    [(4096, 4096, 128256, 1, 256), (2**26, 1024, 1024, 1, 16), (4096, 65536, 4096, 64, 256)],
    ids=["vocabulary", "many rows", "64 blocks"],
)
def test_no_grid_exceeds_what_a_gpu_launches(
    M: int, K: int, n: int, blocks: int, r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids: dict[str, tuple[int, ...]] = {}

    def record(self: launch.Launch, *_: Any) -> None:
        grids[self.kernel.fn.__name__] = self.grid

    monkeypatch.setattr(launch.Launch, "__call__", record)
    everything(M, K, n, blocks, r)
    assert set(grids) == {name for name in KERNELS if r <= configs.MAX_FUSED_RANK or not name.startswith("fused")}
    for name, (x, *others) in grids.items():
        assert 0 < x < 2**31, name
        assert all(0 < size < 2**16 for size in others), name


class Compiled:
    """What Triton returns of a launch; notes how it is launched again."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def run(self, *arguments: Any) -> None:
        self.log.append(("again", *arguments))


class Kernel:
    """A kernel `(x, scaling, size, TILE: tl.constexpr)` that notes the launches that Triton makes, and where."""

    arg_names = ("x", "scaling", "size", "TILE")

    def __init__(self, log: list[Any]) -> None:
        self.log, self.fn = log, object()

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Compiled]:
        def call(*args: Any, **constants: Any) -> Compiled:
            self.log.append((grid, args, constants))
            return Compiled(self.log)

        return call


def launch_of(kernel: Kernel, size: int = 1, device: torch.device = CPU, **more: Any) -> launch.Launch:
    """A launch of `size` programs."""
    return launch.Launch(kernel, device, (size, 1, 1), (), [size], {"TILE": 16, "num_warps": 2}, **more)


@pytest.fixture
def triton_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream of a device is 100 more than its number."""
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda index: 100 + (index or 0)))
    monkeypatch.setattr(launch, "driver", driver)


@pytest.mark.usefixtures("triton_driver")
def test_triton_is_asked_once_for_what_it_has_compiled_for_a_key() -> None:
    log: list[Any] = []
    kernel, x = Kernel(log), torch.zeros(4)
    first, other, another = (launch_of(kernel, size) for size in (5, 6, 7))
    another.key = "another"
    for each in (first, first, other, another):
        each(x, 0.5)
    constants = {"TILE": 16, "num_warps": 2}

    def again(size: int) -> tuple[Any, ...]:
        return ("again", size, 1, 1, 100, "function", "metadata", None, None, None, x.data_ptr(), 0.5, size, 16)

    by_triton = [((size, 1, 1), (x, 0.5, size), constants) for size in (5, 7)]
    assert log == [by_triton[0], again(5), again(6), by_triton[1]]


@pytest.mark.usefixtures("triton_driver")
@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_a_profiler_see_every_launch(hook: str) -> None:
    log: list[Any] = []
    hooks, watched = getattr(launch.knobs.runtime, hook), launch_of(Kernel(log))
    watched("x", 0.5)
    hooks.add(print)
    try:
        watched("x", 0.5)
    finally:
        hooks.remove(print)
    watched("x", 0.5)
    assert [entry[0] for entry in log] == [(1, 1, 1), (1, 1, 1), "again"]


@pytest.mark.usefixtures("triton_driver")
def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current, log, where = [0], [], []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    class Noting(Kernel):
        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Compiled]:
            where.append(current[-1])
            return super().__getitem__(grid)

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(launch, "arch", lambda device: 80)
    kernel = Noting(log)
    for index in (1, 0, 1):
        launch_of(kernel, device=torch.device("cuda", index))("x", 0.5)
    assert where == [1, 0]
    assert log[-1][:5] == ("again", 1, 1, 1, 101)


@pytest.mark.usefixtures("triton_driver")
def test_tma_gets_descriptors_and_elsewhere_a_kernel_gets_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.zeros(6, 32, dtype=torch.float16)[:, :16]
    box = launch.Box(0, (6, 2, 8), (32, 8, 1), (4, 1, 8))
    log: list[Any] = []
    described = launch_of(Kernel(log), boxes=[box])
    described(matrix, 0.5)
    described(matrix, 0.5)
    made, again = log[0][1][0], log[1][10]
    assert made == TensorDescriptor(matrix, [6, 2, 8], [32, 8, 1], [4, 1, 8])
    for field in dataclasses.fields(TensorDescriptor):
        if field.name != "block_shape":
            expected, found = getattr(made, field.name), getattr(again, field.name)
            assert found is expected or list(found) == list(expected), field.name
    monkeypatch.setattr(launch, "arch", lambda device: 80)
    plain = launch_of(Kernel(log), boxes=[box])
    plain(matrix, 0.5)
    assert log[-1][1][0] is matrix


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_every_form_computes_on_a_gpu_that_is_not_the_current_one() -> None:
    def results(device: str) -> list[Tensor]:
        torch.manual_seed(0)
        x, dy, W = (torch.randn(*shape).to(device, torch.bfloat16) for shape in ((96, 64), (96, 64), (64, 64)))
        A, B = torch.randn(1, 16, 64).to(x), torch.randn(1, 64, 16).to(x)
        operands = LoRAOperands(A, B, torch.ones(1, device=device), 0.1, 1.0)
        found = []
        for operation in (Forward(x, W, None, operands), InputGradient(dy, W, None, operands)):
            found += [t for form in operation.algorithms() for t in operation.compute(form)]
        S, T = skinny.products(x, operands, forward=True), skinny.products(dy, operands, forward=False)
        found += weight_gradients.weight_gradients(
            x, dy, S, T, operands, (True,) * 3, configs.weight_gradients(launch.arch(x.device), 16)[0]
        )
        off = operands._replace(gate=operands.gate - 1)
        return [*found, gate_probe.gate_probe(dy, x, off, 3, None), gate_probe.sample_rows(x, 7, 1)]

    with torch.cuda.device(0):
        for here, there in zip(results("cuda:0"), results("cuda:1"), strict=True):
            torch.testing.assert_close(here, there, rtol=0, atol=0, check_device=False)


@pytest.mark.parametrize(("major", "arch"), [(8, 80), (9, 90), (10, 100), (12, 80)])
def test_each_compute_capability_has_the_tiles_of_an_arch(major: int, arch: int) -> None:
    assert configs.arch_of(major) == arch
    assert arch in configs.SHARED_MEMORY


def test_only_what_is_not_aligned_to_16_bytes_is_copied(device: torch.device) -> None:
    whole = torch.randn(8, 64, dtype=torch.float32, device=device).half()
    for fine in (whole, whole[:, 8:40], whole[::2, :16], whole[3:]):
        assert launch.aligned(fine) is fine
    for other in (whole[:, 1:17], whole.view(-1)[:504].view(8, 63)[:, :56], whole[:1].expand(8, 64), whole.T[:, :8]):
        copied = launch.aligned(other)
        assert copied.data_ptr() % 16 == copied.stride(0) * 2 % 16 == 0
        assert copied.is_contiguous()
        assert torch.equal(copied, other)


def test_a_vector_that_does_not_start_at_16_bytes_is_copied(device: torch.device) -> None:
    whole = torch.randn(9, device=device)
    assert launch.at_16(whole) is whole
    copied = launch.at_16(whole[1:])
    assert copied.data_ptr() % 16 == 0
    assert torch.equal(copied, whole[1:])
