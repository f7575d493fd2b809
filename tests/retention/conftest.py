"""A small model with a fused projection, adapted, whose blocks have updates; and samples for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import slora
from slora.gates.values import set_gates
from slora.layers import adapted_layers


class Net(nn.Module):
    """Samples [n, 8] to logits [n, 3]; `qkv` has three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.head = nn.Linear(8, 24), nn.Linear(8, 6), nn.Linear(6, 3)

    def features(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(torch.tanh(q * k + v))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


Made = Callable[..., Net]


@pytest.fixture
def make() -> Made:
    """A factory of equal models: `make(on)` with the blocks q, k, v, proj that `on` switches on, "1111" for all."""

    def made(on: str = "1111", dtype: torch.dtype = torch.float64) -> Net:
        with torch.random.fork_rng():
            torch.manual_seed(2)
            model = slora.inject(
                Net().to(dtype),
                slora.SelectiveLoRAConfig(r=2, lora_alpha=3, target_modules=["qkv", "proj"], modules_to_save=["head"]),
            )
            for _, layer in adapted_layers(model):
                for name in ("lora_A", "lora_B", "gate"):
                    getattr(layer, name).data = getattr(layer, name).data.to(dtype)
                layer.lora_B.data.normal_(std=0.3)
        flags = iter(on)
        set_gates(
            {
                layer: [0.15 if next(flags) == "1" else 0.05 for _ in range(layer.blocks)]
                for _, layer in adapted_layers(model)
            }
        )
        return model

    return made


@pytest.fixture
def samples() -> Tensor:
    """Ten samples [10, 8]."""
    return torch.randn(10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def updates(model: Net) -> dict[str, Tensor]:
    """`c B A` of every block by its name, written out."""
    c = 3 / 2
    q, k, v = (c * model.qkv.lora_B[i] @ model.qkv.lora_A[i] for i in range(3))
    return {"q": q, "k": k, "v": v, "proj": c * model.proj.lora_B[0] @ model.proj.lora_A[0]}


def inputs(model: Net, x: Tensor) -> dict[str, Tensor]:
    """The inputs of both layers in the base model."""
    q, k, v = (x @ model.qkv.weight.T + model.qkv.bias).chunk(3, -1)
    return {"qkv": x, "proj": torch.tanh(q * k + v)}
