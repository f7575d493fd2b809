"""The vision transformers that training and inference are measured on, from random weights: nothing is downloaded."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.results import need

Inputs = tuple[Tensor, Tensor]
# The root mean square of B A: half of what the weights of most models start from.
UPDATE = 0.01
# The names of the layers that PEFT adapts for "all linears", and what they would hit besides.
PEFT_TARGETS, PEFT_EXCLUDES = ("qkv", "proj", "fc1", "fc2"), ("patch_embed.proj",)


class Model:
    """A vision transformer of timm with 100 classes; `arguments` are timm's."""

    def __init__(self, name: str, **arguments: int) -> None:
        self.name, self.arguments = name, arguments

    def build(self, device: str) -> nn.Module:
        """Make it in fp32 on a device."""
        with torch.device(device):
            net: nn.Module = need("timm").create_model(self.name, num_classes=100, **self.arguments)
        return net.to(device)

    def inputs(self, batch: int, device: str, dtype: torch.dtype) -> Inputs:
        """Images and their classes."""
        edge = self.arguments.get("img_size", 224)
        x = torch.randn(batch, 3, edge, edge, device=device).to(dtype)
        return x, torch.randint(0, 100, (batch,), device=device)

    def loss(self, net: nn.Module, inputs: Inputs) -> Tensor:
        """The cross entropy, in fp32 or wider."""
        logits = net(inputs[0])
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), inputs[1])

    def few(self, net: nn.Module) -> list[str]:
        """The layers that stay active where few do: the attention and MLP output projections of the last two blocks."""
        names = [name for name, _ in net.named_modules()]
        return [name for end in ("attn.proj", "mlp.fc2") for name in [n for n in names if n.endswith(end)][-2:]]


MODELS = {
    "tiny": Model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=3, num_heads=3),
    "vit-s": Model("vit_small_patch16_224"),
    "vit-b": Model("vit_base_patch16_224"),
    "vit-l": Model("vit_large_patch16_224"),
}


def peft_model(
    net: nn.Module, rank: int, alpha: float, targets: list[str], excludes: tuple[str, ...] = (), fp32: bool = False
) -> Any:
    """`net` with PEFT's LoRA, its adapters in the dtype of the weights, which is its faster choice, or in `fp32`.

    fp32 adapters, PEFT's default, cast every input of a bf16 model to fp32 and multiply there.
    """
    peft = need("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, exclude_modules=[*excludes] or None)
    return peft.get_peft_model(net, config, autocast_adapter_dtype=fp32)


@torch.no_grad()
def randomise_updates(net: nn.Module) -> None:
    """Give every B of slora or PEFT random values, so that the updates are far larger than the rounding of weights."""
    generator, parameters = torch.Generator().manual_seed(0), dict(net.named_parameters())
    for name, B in parameters.items():
        if "lora_B" in name:
            A = parameters[name.replace("lora_B", "lora_A")].float()
            # The sum over r of B A has the variance of B times the mean square of A, r times.
            std = UPDATE / math.sqrt(float(A.square().mean()) * B.shape[-1])
            B.copy_(torch.randn(B.shape, generator=generator) * std)
