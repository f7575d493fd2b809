"""The models that steps and inference are measured on, each with its inputs, its loss and its few chosen layers.

All start from random weights: nothing is downloaded, and the time does not depend on the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.results import BenchmarkError, need

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        build: makes it in fp32 on a device; random weights of a billion parameters take long on a CPU.
        inputs: `(batch, device, dtype)` to what `loss` and `forward` take.
        forward, loss: `(net, inputs)` to an output, or to a scalar.
        items: what is counted per second, and how many an element of the batch is.
        peft_targets: names that PEFT adapts for "all linears", None where it cannot.
        peft_excludes: what those names would hit besides.
        few: the names of the layers that stay active where few do.
        first: the names of modules of which at least one output needs a gradient whatever linear layers are adapted:
            the first of those layers, or what follows them where they are no modules.
    """

    name: str
    build: Callable[[str], nn.Module]
    inputs: Callable[[int, str, torch.dtype], Inputs]
    forward: Callable[[nn.Module, Inputs], Tensor]
    loss: Callable[[nn.Module, Inputs], Tensor]
    few: Callable[[nn.Module], list[str]]
    first: Callable[[nn.Module], list[str]]
    items: tuple[str, int] = ("images", 1)
    head: str | None = None
    peft_targets: tuple[str, ...] | None = None
    peft_excludes: tuple[str, ...] = ()

    def with_trainable_head(self, net: nn.Module) -> nn.Module:
        """`net` with its new head trained in full, where it has one."""
        if self.head is not None:
            net.get_submodule(self.head).requires_grad_(True)
        else:
            # Something has to be trained for a step without blocks to have a backward.
            for name, parameter in net.named_parameters():
                if name.endswith(("logit_scale", ".norm.weight", "ln_final.weight")):
                    parameter.requires_grad_(True)
        return net


def _images(batch: int, device: str, dtype: torch.dtype, edge: int = 224, classes: int = 100) -> Inputs:
    x = torch.randn(batch, 3, edge, edge, device=device).to(dtype)
    return x, torch.randint(0, classes, (batch,), device=device)


def _classify(net: nn.Module, inputs: Inputs) -> Tensor:
    return F.cross_entropy(_wide(net(inputs[0])), inputs[1])


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _last_two(net: nn.Module) -> list[str]:
    depth = len(net.blocks)  # type: ignore[arg-type]
    return [f"blocks.{i}.{part}" for i in range(depth - 2, depth) for part in ("attn.proj", "mlp.fc2")]


def vit(name: str, **arguments: int) -> Model:
    """A vision transformer of timm with 100 classes."""

    def build(device: str) -> nn.Module:
        with torch.device(device):
            net: nn.Module = need("timm").create_model(name, num_classes=100, **arguments)
        return net.to(device)

    edge = arguments.get("img_size", 224)
    return Model(
        name, build, lambda batch, device, dtype: _images(batch, device, dtype, edge),
        lambda net, inputs: net(inputs[0]), _classify, _last_two, lambda net: ["blocks.0.attn.qkv"], head="head",
        peft_targets=("qkv", "proj", "fc1", "fc2"), peft_excludes=("patch_embed.proj",),
    )  # fmt: skip


def clip() -> Model:
    """open_clip's ViT-B/16, both towers, with the contrastive loss over the batch."""

    def build(device: str) -> nn.Module:
        net: nn.Module = need("open_clip").create_model("ViT-B-16", device=device)
        return net

    def inputs(batch: int, device: str, dtype: torch.dtype) -> Inputs:
        text = torch.randint(1, 49405, (batch, 77), device=device)
        text[:, -1] = 49407  # the end of the text, where its feature is read
        return torch.randn(batch, 3, 224, 224, device=device).to(dtype), text

    def forward(net: nn.Module, inputs: Inputs) -> Tensor:
        return torch.cat(net(*inputs)[:2])

    def loss(net: nn.Module, inputs: Inputs) -> Tensor:
        image, text, scale = net(*inputs)[:3]
        logits = _wide(scale) * _wide(image) @ _wide(text).T
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def few(net: nn.Module) -> list[str]:
        return [
            f"{tower}transformer.resblocks.{i}.{part}"
            for tower in ("visual.", "")
            for i in (10, 11)
            for part in ("mlp.c_fc", "mlp.c_proj")
        ]

    def first(net: nn.Module) -> list[str]:
        # What follows attention, whose weights of query, key and value belong to no module of their own.
        return ["visual.transformer.resblocks.0.ls_1", "transformer.resblocks.0.ls_1"]

    return Model("open_clip ViT-B-16", build, inputs, forward, loss, few, first, ("pairs", 1))


def llama(
    width: int = 2048, layers: int = 16, hidden: int = 8192, heads: int = 32, groups: int = 8, vocabulary: int = 32000,
    length: int = 1024,
) -> Model:  # fmt: skip
    """A causal language model in Llama's shape, by default of about 1 B parameters."""

    def build(device: str) -> nn.Module:
        transformers = need("transformers")
        config = transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=length, use_cache=False,
            tie_word_embeddings=True,
        )  # fmt: skip
        with torch.device(device):
            net: nn.Module = transformers.LlamaForCausalLM(config)
        return net.to(device)

    def inputs(batch: int, device: str, dtype: torch.dtype) -> Inputs:
        return (torch.randint(0, vocabulary, (batch, length), device=device),)

    def forward(net: nn.Module, inputs: Inputs) -> Tensor:
        logits: Tensor = net(inputs[0]).logits
        return logits

    def loss(net: nn.Module, inputs: Inputs) -> Tensor:
        logits = forward(net, inputs)[:, :-1]
        return F.cross_entropy(_wide(logits.flatten(0, 1)), inputs[0][:, 1:].flatten())

    def few(net: nn.Module) -> list[str]:
        return [
            f"model.layers.{i}.{part}"
            for i in range(layers - 2, layers)
            for part in ("self_attn.o_proj", "mlp.down_proj")
        ]

    def first(net: nn.Module) -> list[str]:
        return [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]

    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return Model(
        f"llama {width}x{layers}", build, inputs, forward, loss, few, first, ("tokens", length), peft_targets=targets
    )  # fmt: skip


TINY_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
MODELS: dict[str, Callable[[], Model]] = {
    "tiny": lambda: vit("vit_tiny_patch16_224", **TINY_VIT),
    "tiny-llama": lambda: llama(64, 3, 96, 4, 2, 40, 8),
    "vit-s": lambda: vit("vit_small_patch16_224"),
    "vit-b": lambda: vit("vit_base_patch16_224"),
    "vit-l": lambda: vit("vit_large_patch16_224"),
    "clip": clip,
    "llama-1b": llama,
}


def find(name: str) -> Model:
    """Return the model called `name`."""
    if name not in MODELS:
        raise BenchmarkError(f"model {name!r} is unknown; there are {', '.join(MODELS)}")
    return MODELS[name]()


# The root mean square of B A: half of what the weights of most models start from.
UPDATE = 0.01


@torch.no_grad()
def randomise_updates(net: nn.Module, seed: int = 0) -> None:
    """Give every B of slora or PEFT random values, so that the updates are far larger than the rounding of weights."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(net.named_parameters())
    for name, B in parameters.items():
        if "lora_B" in name:
            A = parameters[name.replace("lora_B", "lora_A")].float()
            # The sum over r of B A has the variance of B times the mean square of A, r times.
            std = UPDATE / math.sqrt(float(A.square().mean()) * B.shape[-1])
            B.copy_(torch.randn(B.shape, generator=generator) * std)
