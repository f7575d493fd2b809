"""`TrainSettings`: all settings of a run, checked when they are made. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import typing
from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from slora.config import Inactive, SelectiveLoRAConfig, Tower, Unit
from slora.errors import ConfigError
from slora.io.plain import plain, plain_list, plain_mapping, shown
from slora.io.yaml_files import read_yaml
from slora.runs.check_retention import check_retention
from slora.runs.conversion import converted
from slora.runs.heads import Head, Loss, check_head, is_contrastive
from slora.runs.strategies import StrategyName, check_strategy, strategy_of, unit_of
from slora.sources.model_args import Scalar, check_keys

Method = Literal["selective", "lora", "full", "linear"]

# A threshold below every value that a gate can take.
ALWAYS_ACTIVE = -1e9


# Settings, the condition on their values, and the remedy. None, where a setting may be unset, is always valid.
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "epochs max_steps batch_size gradient_accumulation eval_batch_size log_every keep_last retain_samples img_size "
        "shots",
        lambda value: value >= 1,
        "use 1 or more",
    ),
    # So many losses, or images, are held in memory.
    ("log_every retain_samples", lambda value: value <= 1_000_000, "use at most 1000000"),
    ("seed num_workers eval_every save_every head_first", lambda value: value >= 0, "use 0 or more"),
    (
        "penalty gate_lr lr weight_decay clip_norm retain_weight drift_price depth_price drift_penalty l2_penalty "
        "ewc_penalty replay_weight",
        lambda value: 0 <= value < math.inf,
        "use a finite number from 0 up",
    ),
    ("warmup lr_hold min_lr_ratio selection_warmup", lambda value: 0 <= value <= 1, "use a share from 0 to 1"),
    ("momentum label_smoothing", lambda value: 0 <= value < 1, "use a number from 0 to below 1"),
)


@dataclass(frozen=True)
class TrainSettings:
    """All settings of a run. `slora finetune` has a flag for each; `config.yaml` of a run directory holds them all.

    Fields that `slora.SelectiveLoRAConfig` has too mean the same. Shares are fractions of the run's optimizer steps,
    from 0 to 1. `model`, `pretrained`, `img_size`, `model_args`, `data`, `data_root`, `download`, `shots`, `augment`,
    `loss`, `templates` and `class_names` are for the command line only: `slora.training.train` takes the model and the
    data themselves.

    Raises:
        ConfigError: a value is out of range or of the wrong type; names the field, the value and what is allowed.
    """

    model: Annotated[
        str | None, "Model: timm/NAME, open_clip/ARCH[:PRETRAINED], demo/letters_vit or demo/glyph_clip."
    ] = None
    pretrained: Annotated[
        bool | str,
        "Start from the model's pretrained weights; of an open_clip model, name them: a tag, or a file such as one "
        "written by slora merge.",
    ] = False
    img_size: Annotated[int | None, "Side of the images that the model takes, in pixels; unset: the model's own."] = (
        None
    )
    model_args: Annotated[
        dict[str, Scalar] | None,
        "More arguments of timm's or open_clip's create_model, such as drop_path_rate=0.1,qk_norm=true.",
    ] = None
    data: Annotated[str | None, "Data set: a name such as cifar100, or imagefolder:PATH."] = None
    data_root: Annotated[str, "Folder that holds downloaded data sets."] = "data"
    download: Annotated[bool, "Download the data set where it is missing."] = True
    shots: Annotated[int | None, "Training images per class, drawn by the seed (few-shot); unset: all."] = None
    augment: Annotated[
        Literal["auto", "none", "crop", "crop-flip"],
        "Augmentation: random crops and flips of training images; auto: what suits the data set.",
    ] = "auto"

    head: Annotated[
        Head,
        "linear: a new head, of a CLIP on its image embedding; zero-shot: no new weights, the classes of a CLIP are "
        "prompts.",
    ] = "linear"
    tower: Annotated[Tower, "With a zero-shot head: the tower of the CLIP to train; logit_scale as well."] = "image"
    loss: Annotated[
        Loss | None,
        "With a zero-shot head: cross-entropy on its logits (a trained text tower runs a prompt of every class), or "
        "contrastive: an image with a prompt of its class, all others of the batch as negatives (FLYP); unset: "
        "cross-entropy for the image tower, else contrastive.",
    ] = None
    templates: Annotated[
        str | None,
        "With a zero-shot head: prompts, openai (80), simple (7), or a file with one a line and {} for the class; "
        "unset: the model's own, or openai.",
    ] = None
    class_names: Annotated[
        str | None,
        "With a zero-shot head: file of names of the classes, one a line in the order of the classes, or "
        "CLASS<TAB>NAME; unset: open_clip's for ImageNet, else those of the data set.",
    ] = None

    method: Annotated[
        Method, "selective: gated LoRA blocks; lora: all blocks, no gates; full: all weights; linear: the head."
    ] = "selective"
    r: Annotated[int, "Rank of every LoRA block."] = 16
    lora_alpha: Annotated[float, "Numerator of the scaling lora_alpha / r."] = 16.0
    lora_dropout: Annotated[float, "Probability of dropping an input element of the LoRA path."] = 0.0
    target_modules: Annotated[
        str | list[str], "Layers to adapt: all-linear, a regular expression, or name endings separated by commas."
    ] = "all-linear"
    exclude_modules: Annotated[str | list[str] | None, "Layers not to adapt; same syntax as target_modules."] = None
    modules_to_save: Annotated[
        list[str] | None,
        "Modules trained in full and saved with the adapter; unset: the classifier head, or logit_scale.",
    ] = None
    rank_pattern: Annotated[
        dict[str, int] | None,
        "Ranks of some layers: name endings or regular expressions with a rank, such as qkv=8,fc2=32.",
    ] = None
    alpha_pattern: Annotated[dict[str, float] | None, "lora_alpha of some layers; same syntax as rank_pattern."] = None
    use_rslora: Annotated[bool, "Rank-stabilised scaling: lora_alpha / sqrt(r)."] = False
    blocks: Annotated[
        int | Literal["auto"], "LoRA blocks per layer; auto: three on a fused qkv projection, else one."
    ] = "auto"
    threshold: Annotated[float, "A block is active while its gate is at least this."] = 0.1
    gate_init: Annotated[float, "Gate of every block at the start."] = 0.15
    inactive: Annotated[
        Inactive,
        "Gate gradient of inactive blocks: exact (every step), probe (an estimate now and then, nearly free) or frozen "
        "(none).",
    ] = "probe"
    probe_every: Annotated[int, "Optimizer steps between two probes."] = 10
    probe_rows: Annotated[int, "Rows of a layer's input that a probe reads."] = 512
    base_dtype: Annotated[str | None, "Dtype of the frozen weights, such as bfloat16; unset: unchanged."] = None

    strategy: Annotated[
        StrategyName | None,
        "What chooses the blocks: gates (scores trained under a penalty), budget (all train, then the lowest ranked "
        "are switched off one by one), sensitivity (squared gradients on a few batches, before training), or, to "
        "compare with, random, first, last or all blocks; sora, codyra, increlora and adalora choose single ranks of "
        "blocks. Unset: budget where one is given, else gates.",
    ] = None
    budget: Annotated[
        int | float | None,
        "LoRA blocks of the result, or ranks: a number such as 4, or a share such as 0.1; unset: the gates decide.",
    ] = None
    budget_unit: Annotated[
        Unit | None,
        "What a share is of: blocks, their parameters, or their FLOPs; ranks with a strategy that chooses them; unset: "
        "blocks, or ranks.",
    ] = None
    ranking: Annotated[
        Literal["solo", "norm"],
        "How a budget ranks blocks: solo (loss reduction of each block alone, one forward pass per block) or norm (of "
        "the update, free).",
    ] = "solo"
    drift_price: Annotated[
        float | None,
        "With ranking solo: divide each gain by the drift of the final features on drift_data, to this power. "
        "[default: 0.5 with retained data, else 0]",
    ] = None
    drift_data: Annotated[
        Literal["generic", "retained"],
        "What drift_price measures the drift on: generic (noise and shuffled patches) or retained (retain_data).",
    ] = "generic"
    depth_price: Annotated[
        float | None,
        "With ranking solo, or strategy sensitivity: divide each score by 200 ** (1 - depth) to this power, depth 0 "
        "for the first layer and 1 for the last. [default: 0.75 with ranking solo without retained data, else 0]",
    ] = None
    selection_warmup: Annotated[
        float | None,
        "Share of the steps before the first block is switched off; unset: 0.3 with a budget, 0.1 with gates.",
    ] = None
    settling: Annotated[
        float | None,
        "Share of the steps at the end in which the choice of blocks is final, at least a third; unset: 0.6 with a "
        "budget, 1/3 with gates.",
    ] = None
    penalty: Annotated[float, "Without a budget: weight of the mean |gate| that is added to the loss."] = 1.0
    gate_rule: Annotated[
        Literal["proximal", "sgd"],
        "Optimizer of the gates: proximal (gradient step, then soft threshold) or sgd (penalty in the loss).",
    ] = "proximal"
    gate_lr: Annotated[float, "Learning rate of the gates; constant over the run."] = 1e-2

    head_first: Annotated[
        int | None,
        "Steps that train the head alone, on features computed once, before the run; unset: 100 for a new head.",
    ] = None
    retain_data: Annotated[
        str | None,
        "Unlabelled images on which the features should not change: a folder, a data set by name, generic (noise and "
        "shuffled patches), mixed (pairs of training images) or target (training images); unset: none.",
    ] = None
    retain_weight: Annotated[float, "Weight of the feature drift on retain_data in the loss."] = 2.0
    retain_samples: Annotated[int, "Images of retain_data, and of replay_data, to use."] = 64
    drift_penalty: Annotated[
        float,
        "Weight of the local drift in the loss: what each block changes of its layer's output on retain_data, or else "
        "on training images.",
    ] = 0.0
    l2_penalty: Annotated[float, "Weight of the squared distance to the base weights, ||cBA||^2, in the loss."] = 0.0
    ewc_penalty: Annotated[
        float,
        "Weight of the same distance weighted by how much the features on retain_data depend on each weight (EWC).",
    ] = 0.0
    replay_data: Annotated[
        str | None,
        "Data set that the pretrained head was trained on; some of its images are classified by it; unset: none.",
    ] = None
    replay_weight: Annotated[float, "Weight of the cross-entropy on replay_data in the loss."] = 1.0
    log_drift: Annotated[bool, "Write the local drift of every block to metrics.jsonl and the report."] = False

    epochs: Annotated[int, "Passes over the training data."] = 10
    max_steps: Annotated[int | None, "Optimizer steps of the run; overrides epochs."] = None
    batch_size: Annotated[int, "Images per forward pass and process."] = 128
    gradient_accumulation: Annotated[int, "Forward passes per optimizer step."] = 1
    optimizer: Annotated[Literal["adamw", "sgd"], "Optimizer of everything but the gates."] = "adamw"
    lr: Annotated[float, "Peak learning rate; linear warm-up, constant phase, cosine decay."] = 1e-3
    lr_hold: Annotated[
        float | None,
        "Share of the steps before the cosine begins; unset: until the blocks are chosen with a budget, else 0.",
    ] = None
    min_lr_ratio: Annotated[float, "Learning rate at the end, as a share of lr."] = 0.0
    warmup: Annotated[float, "Share of the steps over which the learning rate rises."] = 0.05
    weight_decay: Annotated[
        float, "Weight decay of matrices, decoupled under adamw; gates, biases and norms have none."
    ] = 0.01
    momentum: Annotated[float, "Momentum of the sgd optimizer."] = 0.9
    clip_norm: Annotated[float, "Gradient clipping: largest norm, gates and the rest separately; 0: no clipping."] = 1.0
    label_smoothing: Annotated[float, "Label smoothing of the cross-entropy."] = 0.0
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        "Mixed precision; auto: bf16 where the GPU supports it. Trained weights stay fp32.",
    ] = "auto"
    device: Annotated[Literal["auto", "cpu"], "auto: the GPU if there is one."] = "auto"
    seed: Annotated[int, "Seed of initial weights, order of images, augmentation and dropout."] = 0
    num_workers: Annotated[
        int | None, "DataLoader workers; 0: the training process loads images; unset: one per core, at most 4."
    ] = None

    eval_batch_size: Annotated[int, "Images per forward pass of an evaluation."] = 256
    eval_every: Annotated[int | None, "Steps between evaluations; unset: every epoch; 0: only at the end."] = None
    log_every: Annotated[int, "Steps between lines of metrics.jsonl."] = 10
    save_every: Annotated[int | None, "Steps between checkpoints; unset: every epoch; 0: only at the end."] = None
    keep_last: Annotated[int, "Checkpoints to keep, besides the most accurate."] = 2
    tensorboard: Annotated[bool, "Write TensorBoard events."] = True
    progress: Annotated[bool, "Show a progress bar."] = True
    count_flops: Annotated[bool, "Count the FLOPs of training."] = True

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = plain_mapping(plain(getattr(self, f.name)))
            if isinstance(value, (set, frozenset, KeysView, Iterator)):
                value = plain_list(value)
            value = converted(f.name, value, hints[f.name])
            object.__setattr__(self, f.name, value)
            _require(f.name, value, not isinstance(value, int) or abs(value) < 1 << 63, "use a smaller number")
        for names, holds, remedy in _RANGES:
            for name in names.split():
                value = getattr(self, name)
                _require(name, value, value is None or holds(value), remedy)
        check_keys(self.model_args or ())
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        check_strategy(self.to_dict(), defaults)
        check_head(self.to_dict(), self.unit)
        check_retention(self.to_dict())
        if self.base_dtype is not None and self.precision == "fp32":
            raise ConfigError(
                f"base_dtype={self.base_dtype!r} needs precision='bf16'; fp32 arithmetic needs fp32 weights"
            )
        self.lora_config()

    def lora_config(self, modules_to_save: Sequence[str] | None = None) -> SelectiveLoRAConfig:
        """Return the adapter config of the methods selective and lora; under lora every block is always active.

        Raises:
            ConfigError: a value is out of range.
        """
        names = {f.name for f in dataclasses.fields(SelectiveLoRAConfig)}
        fields = {name: value for name, value in self.to_dict().items() if name in names}
        if modules_to_save is not None:
            fields["modules_to_save"] = list(modules_to_save)
        if self.method == "lora":
            fields |= {"threshold": ALWAYS_ACTIVE, "gate_init": 1.0}
        return SelectiveLoRAConfig.from_dict(fields)

    @property
    def chosen_strategy(self) -> str:
        """The strategy of method selective: by default budget with a budget, else gates."""
        return strategy_of(self.to_dict())

    @property
    def unit(self) -> Unit:
        """What the budget counts or is a share of: by default the first unit of the strategy."""
        return unit_of(self.to_dict())

    @property
    def contrastive(self) -> bool:
        """Whether the loss is the contrastive one: by default with a zero-shot head, if the text tower is trained."""
        return is_contrastive(self.to_dict())

    def workers(self) -> int:
        """Return the number of DataLoader workers."""
        return default_workers() if self.num_workers is None else self.num_workers

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-serialisable values; `from_dict` reads them back."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TrainSettings:
        """Build settings from `{name: value}`; names may have hyphens for underscores.

        Raises:
            ConfigError: a name is unknown (near names are listed), or a value is out of range.
        """
        values = {str(name).replace("-", "_"): value for name, value in fields.items()}
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3)
                hint = (
                    f"near names are {', '.join(map(repr, near))}"
                    if near
                    else "it is none of those that slora finetune --help lists"
                )
                raise ConfigError(f"setting {name!r} is unknown; {hint}")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> TrainSettings:
        """Read a YAML mapping of settings; `overrides` replace its values.

        Raises:
            ConfigError: the file is missing, is not a YAML mapping, or `from_dict` refuses it; names the file.
        """
        values = read_yaml(path)
        try:
            cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        return cls.from_dict({str(k).replace("-", "_"): v for k, v in values.items()} | overrides)

    def replace(self, **changes: Any) -> TrainSettings:
        """Return a copy with some fields changed, checked again."""
        return self.from_dict(self.to_dict() | changes)


def default_workers() -> int:
    """Return how many processes to use where the user does not say: one per available core, at most 4."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores)


def _require(name: str, value: object, holds: bool, remedy: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={shown(value)} is out of range; {remedy}")
