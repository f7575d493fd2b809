"""The models that training and inference are measured on, from random weights: nothing is downloaded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.results import need

Inputs = tuple[Tensor, ...]
# The root mean square of B A: half of what the weights of most models start from.
UPDATE = 0.01


def _call(net: nn.Module, inputs: Inputs) -> Tensor:
    output: Tensor = net(inputs[0])
    return output


@dataclass(frozen=True)
class Model:
    """A model with its inputs and its loss.

    Attributes:
        build: makes it in fp32 on a device; a billion random weights take long on a CPU.
        inputs: `(batch, device, dtype)` to what `loss` and `forward` take.
        loss, forward: `(net, inputs)` to a scalar, or to an output.
        chosen: patterns of layer names; the last two layers of each stay active where few do.
        first: modules of which at least one output needs a gradient whatever linear layers are adapted.
        items: what is counted per second, and how many an element of the batch is.
        head: the module that is trained in full beside the blocks, None where there is no new one.
        peft_targets, peft_excludes: names that PEFT adapts for "all linears", None where it cannot, and what those
            would hit besides.
    """

    name: str
    build: Callable[[str], nn.Module]
    inputs: Callable[[int, str, torch.dtype], Inputs]
    loss: Callable[[nn.Module, Inputs], Tensor]
    chosen: tuple[str, ...]
    first: tuple[str, ...]
    forward: Callable[[nn.Module, Inputs], Tensor] = _call
    items: tuple[str, int] = ("images", 1)
    head: str | None = None
    peft_targets: tuple[str, ...] | None = None
    peft_excludes: tuple[str, ...] = ()

    def few(self, net: nn.Module) -> list[str]:
        """The layers that stay active where few do."""
        names = [name for name, _ in net.named_modules()]
        return [name for pattern in self.chosen for name in [n for n in names if re.fullmatch(pattern, n)][-2:]]

    def with_trainable_head(self, net: nn.Module) -> nn.Module:
        """`net` with its head trained in full; without one, the last norm, so that every step has a backward."""
        if self.head is not None:
            net.get_submodule(self.head).requires_grad_(True)
        else:
            for name, parameter in net.named_parameters():
                if name.endswith(("logit_scale", ".norm.weight", "ln_final.weight")):
                    parameter.requires_grad_(True)
        return net


def _made(device: str, make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device(device):
        return make().to(device)


def _fp32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def vit(name: str, **arguments: int) -> Model:
    """A vision transformer of timm with 100 classes."""
    edge = arguments.get("img_size", 224)

    def inputs(batch: int, device: str, dtype: torch.dtype) -> Inputs:
        x = torch.randn(batch, 3, edge, edge, device=device).to(dtype)
        return x, torch.randint(0, 100, (batch,), device=device)

    return Model(
        name, lambda device: _made(device, lambda: need("timm").create_model(name, num_classes=100, **arguments)),
        inputs, lambda net, inputs: F.cross_entropy(_fp32(net(inputs[0])), inputs[1]), (r".*attn\.proj", r".*mlp\.fc2"),
        ("blocks.0.attn.qkv",), head="head", peft_targets=("qkv", "proj", "fc1", "fc2"),
        peft_excludes=("patch_embed.proj",),
    )  # fmt: skip


def clip() -> Model:
    """open_clip's ViT-B/16, both towers, with the contrastive loss over the batch."""

    def inputs(batch: int, device: str, dtype: torch.dtype) -> Inputs:
        text = torch.randint(1, 49405, (batch, 77), device=device)
        text[:, -1] = 49407  # the end of the text, where its feature is read
        return torch.randn(batch, 3, 224, 224, device=device).to(dtype), text

    def loss(net: nn.Module, inputs: Inputs) -> Tensor:
        image, text, scale = (_fp32(t) for t in net(*inputs)[:3])
        logits = scale * image @ text.T
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    towers = ("visual.transformer.resblocks", "transformer.resblocks")
    return Model(
        "open_clip ViT-B-16", lambda device: _made(device, lambda: need("open_clip").create_model("ViT-B-16")),
        inputs, loss, tuple(rf"{tower}\.\d+\.mlp\.{part}" for tower in towers for part in ("c_fc", "c_proj")),
        # What follows attention, whose weights of query, key and value belong to no module of their own.
        tuple(f"{tower}.0.ls_1" for tower in towers), lambda net, inputs: torch.cat(net(*inputs)[:2]), ("pairs", 1),
    )  # fmt: skip


def llama(width: int = 2048, layers: int = 16, vocabulary: int = 32000, length: int = 1024, **sizes: int) -> Model:
    """A causal language model in Llama's shape, by default of about 1 B parameters."""
    sizes = {"intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, **sizes}

    def build() -> nn.Module:
        transformers = need("transformers")
        config = transformers.LlamaConfig(
            hidden_size=width, num_hidden_layers=layers, vocab_size=vocabulary, max_position_embeddings=length,
            use_cache=False, tie_word_embeddings=True, **sizes,
        )  # fmt: skip
        net: nn.Module = transformers.LlamaForCausalLM(config)
        return net

    def forward(net: nn.Module, inputs: Inputs) -> Tensor:
        logits: Tensor = net(inputs[0]).logits
        return logits

    def loss(net: nn.Module, inputs: Inputs) -> Tensor:
        return F.cross_entropy(_fp32(forward(net, inputs)[:, :-1].flatten(0, 1)), inputs[0][:, 1:].flatten())

    return Model(
        f"llama {width}x{layers}", lambda device: _made(device, build),
        lambda batch, device, dtype: (torch.randint(0, vocabulary, (batch, length), device=device),),
        loss, (r".*self_attn\.o_proj", r".*mlp\.down_proj"),
        tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv"), forward, ("tokens", length),
        peft_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    )  # fmt: skip


TINY_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
TINY_LLAMA = {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, Callable[[], Model]] = {
    "tiny": lambda: vit("vit_tiny_patch16_224", **TINY_VIT),
    "tiny-llama": lambda: llama(64, 3, 40, 8, **TINY_LLAMA),
    "vit-s": lambda: vit("vit_small_patch16_224"),
    "vit-b": lambda: vit("vit_base_patch16_224"),
    "vit-l": lambda: vit("vit_large_patch16_224"),
    "clip": clip,
    "llama-1b": llama,
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
