"""How kernels are launched: on which device, with how many programs, and how they read what they are given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

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


KERNELS = (
    (linear, "fused_linear"), (linear, "precomputed_linear"), (skinny, "skinny"), (weight_gradients, "partial_sums"),
    (weight_gradients, "reduce"), (gate_probe, "copy_rows"), (gate_probe, "probe"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("M", "K", "n", "blocks", "r"),
    [(4096, 4096, 128256, 1, 256), (2**26, 1024, 1024, 1, 16), (4096, 65536, 4096, 64, 256)],
    ids=["vocabulary", "many rows", "64 blocks"],
)
def test_no_grid_exceeds_what_a_gpu_launches(
    M: int, K: int, n: int, blocks: int, r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids: dict[str, tuple[int, ...]] = {}

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids[self.name] = grid
            return lambda *_, **__: None

    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Recorder(name))
    monkeypatch.setattr(launch, "boxed", lambda matrix, *box: matrix)
    everything(M, K, n, blocks, r)
    assert set(grids) == {name for _, name in KERNELS if r <= configs.MAX_FUSED_RANK or not name.startswith("fused")}
    for name, (x, *others) in grids.items():
        assert 0 < x < 2**31, name
        assert all(0 < size < 2**16 for size in others), name


def test_kernels_are_launched_on_the_device_of_their_tensors() -> None:
    context = launch.on(torch.device("cuda", 1))
    assert isinstance(context, torch.cuda.device)
    assert context.idx == 1


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
