"""How kernels are launched: on which device, with how many programs, and how they read what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from slora.kernels import configs, gate_probe, launch, linear_backward, linear_forward, skinny, weight_gradients
from slora.kernels.gate_probe import Layer


def rows(M: int, columns: int) -> Tensor:
    return torch.empty(M, columns, dtype=torch.bfloat16, device="meta")


def layer(M: int, K: int, n: int, blocks: int, r: int) -> dict[str, Any]:
    """Operands without memory."""
    A, B = torch.empty(blocks, r, K, device="meta"), torch.empty(blocks, n, r, device="meta")
    return {"x": rows(M, K), "dy": rows(M, blocks * n), "A": A, "B": B, "gate": torch.empty(blocks, device="meta")}


def everything(M: int, K: int, n: int, blocks: int, r: int) -> None:
    """Launch every kernel on a layer of this shape."""
    x, dy, A, B, gate = layer(M, K, n, blocks, r).values()
    W, low = rows(blocks * n, K), rows(M, blocks * r)
    linear_forward.forward(x, W, None, A, B, gate, 0.1, 1.0, blocks, S=low)
    linear_backward.input_gradient(dy, W, A, B, gate, 0.1, 1.0, blocks, T=low)
    skinny.products_S(x, A, gate, 0.1, blocks)
    skinny.products_T(dy, B, gate, 0.1, blocks)
    weight_gradients.weight_gradients(x, dy, low, low, A, B, gate, 0.1, 1.0, (True, True, True))
    gate_probe.sample_rows(x, M - 1 if M < 2**19 else 512, 0)
    gate_probe.gate_probe([Layer(dy, x, A, B, gate, 0.1, 1.0, 0)])


KERNELS = (
    (linear_forward, "linear_forward"), (linear_backward, "linear_backward"), (skinny, "_S"), (skinny, "_T"),
    (weight_gradients, "_partial_sums"), (weight_gradients, "_reduce"), (gate_probe, "_sample_rows"),
    (gate_probe, "_probe"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("M", "K", "n", "blocks", "r"),
    [(4096, 4096, 128256, 1, 256), (2**26, 1024, 1024, 1, 16), (4096, 65536, 4096, 64, 256)],
    ids=["vocabulary", "many rows", "64 blocks"],
)
def test_no_grid_exceeds_what_a_gpu_launches(
    M: int, K: int, n: int, blocks: int, r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = {}

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids[self.name] = grid
            return lambda *_, **__: None

    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Recorder(name))
    everything(M, K, n, blocks, r)
    assert set(grids) == {name for _, name in KERNELS}
    for name, (x, *others) in grids.items():
        assert 0 < x < 2**31, name
        assert all(0 < size < 2**16 for size in others), name


def test_kernels_are_launched_on_the_device_of_their_tensors() -> None:
    context = launch.on(torch.device("cuda", 1))
    assert isinstance(context, torch.cuda.device)
    assert context.idx == 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_every_kernel_computes_on_a_gpu_that_is_not_the_current_one() -> None:
    def results(device: str) -> list[Tensor | None]:
        torch.manual_seed(0)
        x, dy = (torch.randn(96, 64).to(device, torch.bfloat16) for _ in range(2))
        W, A, B = torch.randn(64, 64).to(x), torch.randn(1, 16, 64).to(device), torch.randn(1, 64, 16).to(device)
        gate = torch.ones(1, device=device)
        y, S = linear_forward.forward(x, W, None, A, B, gate, 0.1, 1.0, 1)
        dx, T = linear_backward.input_gradient(dy, W, A, B, gate, 0.1, 1.0, 1)
        gradients = weight_gradients.weight_gradients(x, dy, S, T, A, B, gate, 0.1, 1.0, (True, True, True))
        alone = skinny.products_S(x, A, gate, 0.1, 1), skinny.products_T(dy, B, gate, 0.1, 1)
        probed = gate_probe.gate_probe([Layer(dy, x, A, B, gate - 1, 0.1, 1.0, 3)])
        return [y, S, dx, T, *gradients, *alone, *probed, gate_probe.sample_rows(x, 7, 1)]

    with torch.cuda.device(0):
        for here, there in zip(results("cuda:0"), results("cuda:1"), strict=True):
            torch.testing.assert_close(here, there, rtol=0, atol=0, check_device=False)


@pytest.mark.parametrize(("capability", "access"), [(80, "vectors"), (90, "bulk"), (100, "bulk"), (120, "vectors")])
def test_the_copy_engine_is_used_where_configurations_were_made_for_it(
    capability: int, access: configs.Access, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "capability", lambda device: capability)
    aligned = torch.zeros(8, 32, dtype=torch.float16, device=device)
    assert launch.describable(aligned) == (access == "bulk")
    assert launch.access(aligned, multiple=32) == (access, "16-bit")
    for other, multiple in ((aligned[:, 1:17], 16), (aligned[:, :17], 17), (aligned, 12)):
        assert launch.access(other, multiple=multiple) == ("elements", "16-bit")
    # 8 elements of fp16 are 16 bytes, which is all that the engine asks for.
    assert launch.access(aligned[:, :24], multiple=8)[0] == ("bulk" if access == "bulk" else "elements")
    assert launch.access(aligned.float(), multiple=32) == ("elements", "ieee")
