"""The protocols: settings, runs and published figures. Imports no torch.

Of arXiv 2501.15377 (the method that slora implements) and of its predecessor, arXiv 2404.17245, not every setting is
known to us. What is known is in `known`, what we chose in `chosen`, each with its reason; both are printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from slora.sources.suite_names import SUITES


class Run(NamedTuple):
    """A run of a protocol.

    Attributes:
        name: its folder.
        settings: those of `slora.runs.settings.TrainSettings` in which it differs from the protocol; None for a row
            that was published but cannot be run here.
        published: figures by the name of the measure, in percent or points.
    """

    name: str
    settings: Mapping[str, Any] | None
    published: Mapping[str, float] = {}


class Difference(NamedTuple):
    """A published difference between runs: how much higher `measure` is in `run` than in `others`, in points."""

    measure: str
    run: str
    others: tuple[str, ...]
    published: float


@dataclass(frozen=True)
class Protocol:
    """A published experiment.

    Attributes:
        title: what is compared.
        paper: where it was published.
        known: settings that the paper gives.
        chosen: settings that we chose, with the reason.
        settings: of all runs. `{imagenet}` in a value is the data set ImageNet on this machine.
        runs: in order.
        measures: `{name: what it is}`.
        suites, zero_shot, retrieval, source, k: what each run is evaluated on; retrieval relative to the data folder.
        difference: a published difference between runs.
        note: what the published figures leave open.
    """

    title: str
    paper: str
    known: tuple[str, ...]
    chosen: tuple[str, ...]
    settings: Mapping[str, Any]
    runs: tuple[Run, ...]
    measures: Mapping[str, str]
    suites: tuple[str, ...] = ()
    zero_shot: tuple[str, ...] = ()
    retrieval: tuple[str, ...] = ()
    source: str | None = None
    k: tuple[int, ...] = (10, 20, 100, 200)
    difference: Difference | None = None
    note: str = ""


IMAGENET = "{imagenet}"

# Retrieval and classification sets of the usual CLIP evaluations that torchvision reads.
_ZERO_SHOT = ("cifar10", "cifar100", "dtd", "eurosat", "flowers102", "food101", "pets", "stl10")

FORGETTING_CLIP = Protocol(
    title="CLIP fine-tuned on ImageNet-1k: what it forgets of zero-shot classification and retrieval",
    paper="arXiv 2501.15377 (abstract and Figure 1; the full text was not available to us)",
    known=(
        "data ImageNet-1k; rank 128; 6.25 % of the blocks active; compared with FLYP (arXiv 2212.00638) and LoRA on "
        "all blocks; forgetting is the mean change over zero-shot retrieval and classification",
    ),
    chosen=(
        "model ViT-B/16 of OpenAI, contrastive loss on both towers, 10 epochs, batch 512, weight decay 0.1, the 80 "
        "prompts of OpenAI, learning rate 1e-5 of full fine-tuning: the published command of FLYP",
        "learning rate 1e-4 of LoRA and of selective LoRA, lora_alpha = rank: not tuned",
        "6.25 % as an exact budget, where the paper steers the number of blocks by a penalty",
        f"zero-shot sets {', '.join(_ZERO_SHOT)}, and retrieval on the captions of COCO val2017: the paper's list is "
        f"not known to us",
    ),
    settings={
        "model": "open_clip/ViT-B-16", "pretrained": "openai", "data": IMAGENET, "head": "zero-shot", "tower": "both",
        "loss": "contrastive", "templates": "openai", "epochs": 10, "batch_size": 512, "weight_decay": 0.1,
        "r": 128, "lora_alpha": 128.0,
    },
    runs=(
        Run("flyp", {"method": "full", "lr": 1e-5}, {"forgetting": -16.24}),
        Run("lora", {"method": "lora", "lr": 1e-4}, {"forgetting": -17.12}),
        Run("selective", {"method": "selective", "budget": 0.0625, "lr": 1e-4}),
    ),
    measures={
        "imagenet": "top-1 on ImageNet",
        "ood": "mean top-1 on its shifted test sets",
        "forgetting": "mean change on what the run was not trained on",
    },
    suites=tuple(SUITES),
    zero_shot=_ZERO_SHOT,
    retrieval=("coco/annotations/captions_val2017.json",),
    difference=Difference("forgetting", "selective", ("flyp", "lora"), 7.31),
    note="The abstract says that the selective method forgets 7.31 % less on average, but not less than which other.",
)  # fmt: skip

FORGETTING_DINO = Protocol(
    title="DINO fine-tuned on CIFAR-100: how well its features still separate ImageNet's classes",
    paper="arXiv 2404.17245",
    known=(
        "model DINO ViT-B/16; data CIFAR-100; 10 000 steps of batch 128; LoRA of rank 4, 8 and 16; k-NN on ImageNet "
        "with k of 10, 20, 100, 200, temperature 0.07, normalised features and weighted votes",
    ),
    chosen=(
        "AdamW with learning rate 1e-3 of heads and LoRA, 1e-5 of full fine-tuning; LoRA on all linear layers, "
        "lora_alpha = rank; random crops and flips: not known to us, not tuned",
        "the k-NN accuracy is that of the best of the four k, as it is not said which one was published",
        "selective LoRA of rank 16 with 6.25 % of the blocks, which is not part of that paper",
    ),
    settings={
        "model": "timm/vit_base_patch16_224.dino", "pretrained": True, "data": "cifar100", "max_steps": 10_000,
        "batch_size": 128, "lr": 1e-3,
    },
    runs=(
        Run("full", {"method": "full", "lr": 1e-5}, {"target": 88.13, "knn": 25.24}),
        Run("linear", {"method": "linear"}, {"target": 80.57, "knn": 76.11}),
        Run("lora-r4", {"method": "lora", "r": 4, "lora_alpha": 4.0}, {"target": 87.91, "knn": 66.82}),
        Run("lora-r8", {"method": "lora", "r": 8, "lora_alpha": 8.0}, {"target": 88.27, "knn": 65.99}),
        Run("lora-r16", {"method": "lora", "r": 16, "lora_alpha": 16.0}, {"target": 87.84, "knn": 65.06}),
        Run("block-expansion-p3", None, {"target": 88.58, "knn": 74.61}),
        Run("selective", {"method": "selective", "r": 16, "lora_alpha": 16.0, "budget": 0.0625}),
    ),
    measures={"target": "top-1 on CIFAR-100", "knn": "k-NN on ImageNet"},
    source=IMAGENET,
    note="Block expansion, which adds layers, is not part of slora: its figures are only listed.",
)  # fmt: skip

PROTOCOLS = {"forgetting-clip": FORGETTING_CLIP, "forgetting-dino": FORGETTING_DINO}


def figures(result: Mapping[str, Any]) -> dict[str, float]:
    """Return what an `evaluation.json` says of the measures, in percent or points."""
    found = {"target": 100 * result["accuracy"]["top1"]}
    for task, name in (("id", "imagenet"), ("ood", "ood")):
        if task in result["means"]:
            found[name] = 100 * result["means"][task]["after"]
    if result["forgetting"] is not None:
        found["forgetting"] = 100 * result["forgetting"]["mean_change"]
    if result["knn"] is not None:
        found["knn"] = 100 * max(result["knn"]["after"].values())
    return found
