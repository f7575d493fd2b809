"""`TrainSettings`: every knob of a run, checked when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from slora.config import (
    BUDGET_PHASES,
    GATES_PHASES,
    LEAST_SETTLING,
    Inactive,
    SelectiveLoRAConfig,
    Unit,
    check_budget,
)
from slora.errors import ConfigError
from slora.io.plain import plain, plain_list, plain_mapping
from slora.io.yaml_files import read_yaml
from slora.sources.model_args import Scalar, arguments, check_keys

# One or more module names or endings, separated by commas. Anything else is a regular expression.
_NAMES = re.compile(r"\s*[\w.-]+(\s*,\s*[\w.-]+)*\s*")

Method = Literal["selective", "lora", "full", "linear"]

# Low enough that no score a gate can take switches a block off.
ALWAYS_ACTIVE = -1e9


@dataclass(frozen=True)
class TrainSettings:
    """Every knob of a run. `slora finetune` has a flag for each; `config.yaml` of a run directory holds them all.

    Fields that `slora.SelectiveLoRAConfig` has too mean the same. Shares are of the run's optimizer steps, from 0
    to 1. `model`, `pretrained`, `img_size`, `model_args`, `data`, `data_root`, `download` and `augment` are read by
    the command line and ignored by `slora.training.train`, which gets objects.

    Raises:
        ConfigError: a value is out of range or of the wrong type; names the field, the value and what is allowed.
    """

    model: Annotated[str | None, "Model: timm/NAME, open_clip/ARCH, open_clip/ARCH:PRETRAINED or demo/letters_vit."] = (
        None
    )
    pretrained: Annotated[bool, "Start from the model's pretrained weights."] = False
    img_size: Annotated[int | None, "Side of the images that the model takes, in pixels; unset: the model's own."] = (
        None
    )
    model_args: Annotated[
        dict[str, Scalar] | None,
        "More arguments of the model, given to timm's or open_clip's create_model, as drop_path_rate=0.1,qk_norm=true.",
    ] = None
    data: Annotated[str | None, "Data set: a name such as cifar100, or imagefolder:PATH."] = None
    data_root: Annotated[str, "Folder that holds downloaded data sets."] = "data"
    download: Annotated[bool, "Download the data set where it is missing."] = True
    augment: Annotated[
        Literal["auto", "none", "crop", "crop-flip"],
        "Random crops and mirror images of training data; auto: what suits the data set.",
    ] = "auto"

    method: Annotated[
        Method, "selective: gated LoRA blocks; lora: all blocks, no gates; full: all weights; linear: the head."
    ] = "selective"
    r: Annotated[int, "Rank of every LoRA block."] = 16
    lora_alpha: Annotated[float, "Numerator of the scaling lora_alpha / r."] = 16.0
    lora_dropout: Annotated[float, "Probability of dropping an input element of the LoRA path."] = 0.0
    target_modules: Annotated[
        str | list[str], "Layers to adapt: all-linear, a regular expression, or name endings separated by commas."
    ] = "all-linear"
    exclude_modules: Annotated[str | list[str] | None, "Layers to leave alone, given like target_modules."] = None
    modules_to_save: Annotated[
        list[str] | None, "Modules trained in full and saved with the adapter; unset: the classifier head."
    ] = None
    rank_pattern: Annotated[
        dict[str, int] | None, "Ranks of some layers: name endings or regular expressions with a rank, as qkv=8,fc2=32."
    ] = None
    alpha_pattern: Annotated[dict[str, float] | None, "lora_alpha of some layers, given like rank_pattern."] = None
    use_rslora: Annotated[bool, "Scale by lora_alpha / sqrt(r) instead."] = False
    blocks: Annotated[
        int | Literal["auto"], "LoRA blocks per layer; auto: three on a fused qkv projection, else one."
    ] = "auto"
    threshold: Annotated[float, "A block is active while its gate is at least this."] = 0.1
    gate_init: Annotated[float, "Gate of every block at the start."] = 0.15
    inactive: Annotated[
        Inactive, "What inactive blocks still learn: exact (all), probe (an estimate, nearly free), frozen (nothing)."
    ] = "probe"
    probe_every: Annotated[int, "Optimizer steps between two probes."] = 10
    probe_rows: Annotated[int, "Rows of a layer's input that a probe reads."] = 512
    base_dtype: Annotated[str | None, "Dtype of the frozen weights, such as bfloat16; unset: as they are."] = None

    budget: Annotated[
        int | float | None,
        "LoRA blocks to end with: a number such as 4, or a share such as 0.1; unset: as many as the gates leave.",
    ] = None
    budget_unit: Annotated[Unit, "What a share is of: blocks, their parameters, or their FLOPs."] = "blocks"
    ranking: Annotated[
        Literal["solo", "norm"],
        "What a budget ranks blocks by: solo (what each gains by itself, one forward pass per block) or norm (free).",
    ] = "solo"
    drift_price: Annotated[
        float | None,
        "With ranking solo: divide each gain by the drift of the final features on noise and shuffled patches, to this "
        "power. [default: 0.5 with retained data, else 0]",
    ] = None
    depth_price: Annotated[
        float | None,
        "With ranking solo: divide each gain by 200 ** (1 - depth) to this power, depth 0 for the first layer and 1 "
        "for the last. [default: 0.75 without retained data, else 0]",
    ] = None
    selection_warmup: Annotated[
        float | None,
        "Share of the steps before the first block is switched off; unset: 0.3 with a budget, 0.1 with gates.",
    ] = None
    settling: Annotated[
        float | None,
        "Share of the steps at the end in which the choice of blocks stands, at least a third; unset: 0.6 with a "
        "budget, 1/3 with gates.",
    ] = None
    penalty: Annotated[float, "Without a budget: weight of the mean |gate| that is added to the loss."] = 1.0
    gate_rule: Annotated[
        Literal["proximal", "sgd"],
        "Gates' own update: proximal (gradient step, then soft threshold) or sgd (penalty in the loss).",
    ] = "proximal"
    gate_lr: Annotated[float, "Learning rate of the gates; constant over the run."] = 1e-2

    head_first: Annotated[
        int | None,
        "Steps on the head alone, on features computed once, before the run; unset: 100 where the head is new.",
    ] = None
    retain_data: Annotated[
        str | None,
        "What the model is to keep: unlabelled images (a folder, or a data set by name) whose features are held "
        "where they are, or generic: noise and shuffled patches; unset: none.",
    ] = None
    retain_weight: Annotated[float, "Weight of the retained features' drift in the loss."] = 2.0
    retain_samples: Annotated[int, "Images of retain_data to use."] = 64

    epochs: Annotated[int, "Passes over the training data."] = 10
    max_steps: Annotated[int | None, "Optimizer steps of the run; overrides epochs."] = None
    batch_size: Annotated[int, "Images per forward pass and process."] = 128
    gradient_accumulation: Annotated[int, "Forward passes per optimizer step."] = 1
    optimizer: Annotated[Literal["adamw", "sgd"], "Rule for everything but the gates."] = "adamw"
    lr: Annotated[float, "Highest learning rate; linear warm-up, then held, then a cosine."] = 1e-3
    lr_hold: Annotated[
        float | None,
        "Share of the steps before the cosine begins; unset: with a budget until its choice is made, else none.",
    ] = None
    min_lr_ratio: Annotated[float, "Learning rate at the end, as a share of the highest."] = 0.0
    warmup: Annotated[float, "Share of the steps over which the learning rate rises."] = 0.05
    weight_decay: Annotated[
        float, "Weight decay of matrices, decoupled under adamw; gates, biases and norms have none."
    ] = 0.01
    momentum: Annotated[float, "Momentum of the sgd optimizer."] = 0.9
    clip_norm: Annotated[float, "Largest norm of the gradient, of the gates' apart from the rest; 0: no clipping."] = (
        1.0
    )
    label_smoothing: Annotated[float, "Share of the target spread over all classes."] = 0.0
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        "Arithmetic of the model; auto: bf16 where the GPU supports it. Trained weights stay fp32.",
    ] = "auto"
    device: Annotated[Literal["auto", "cpu"], "auto: the GPU where there is one."] = "auto"
    seed: Annotated[int, "Seed of initial weights, order of images, augmentation and dropout."] = 0
    num_workers: Annotated[
        int | None, "Processes that read images; 0: the training process does; unset: 4, or one per core if fewer."
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
            value = _typed(f.name, value, hints[f.name])
            object.__setattr__(self, f.name, value)
            _require(f.name, value, not isinstance(value, int) or abs(value) < 1 << 63, "use a smaller number")
        for name in (
            "epochs", "batch_size", "gradient_accumulation", "eval_batch_size", "log_every", "keep_last",
            "retain_samples",
        ):  # fmt: skip
            _require(name, getattr(self, name), getattr(self, name) >= 1, "use 1 or more")
        for name in ("log_every", "retain_samples"):
            # So many losses, or images, are kept in memory.
            _require(name, getattr(self, name), getattr(self, name) <= 1_000_000, "use at most 1000000")
        _require("max_steps", self.max_steps, self.max_steps is None or self.max_steps >= 1, "use 1 or more")
        _require("img_size", self.img_size, self.img_size is None or self.img_size >= 1, "use 1 or more")
        check_keys(self.model_args or ())
        for name in ("seed", "num_workers", "eval_every", "save_every", "head_first"):
            _require(name, getattr(self, name), (getattr(self, name) or 0) >= 0, "use 0 or more")
        for name in (
            "penalty",
            "gate_lr",
            "lr",
            "weight_decay",
            "clip_norm",
            "retain_weight",
            "drift_price",
            "depth_price",
        ):
            value = getattr(self, name) or 0.0
            _require(name, value, math.isfinite(value) and value >= 0, "use a finite number from 0 up")
        for name in ("warmup", "min_lr_ratio"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "use a share from 0 to 1")
        for name in ("momentum", "label_smoothing"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "use a number from 0 to below 1")
        hold = 0.0 if self.lr_hold is None else self.lr_hold
        _require("lr_hold", self.lr_hold, 0 <= hold <= 1, "use a share from 0 to 1")
        self._check_selection()
        if self.base_dtype is not None and self.precision == "fp32":
            raise ConfigError(
                f"base_dtype={self.base_dtype!r} needs precision='bf16'; fp32 arithmetic keeps fp32 weights"
            )
        self.lora_config()

    def _check_selection(self) -> None:
        warmup = 0.0 if self.selection_warmup is None else self.selection_warmup
        share = 0 <= warmup <= 1
        _require("selection_warmup", self.selection_warmup, share, "use a share from 0 to 1")
        own = GATES_PHASES if self.budget is None else BUDGET_PHASES
        settling = own[1] if self.settling is None else self.settling
        third = LEAST_SETTLING - 1e-9 <= settling <= 1
        _require("settling", self.settling, third, "use a share from 1/3 to 1, in which what is left goes on learning")
        if warmup + settling > 1 + 1e-9:
            raise ConfigError(
                f"selection_warmup={warmup:g} and settling={settling:.3g} are longer than the run; lower one of them"
            )
        if self.budget is None:
            return
        check_budget(self.budget, self.budget_unit)
        if self.method != "selective":
            raise ConfigError(
                f"budget={self.budget} needs method='selective'; method={self.method!r} trains all of its parameters"
            )

    def lora_config(self, modules_to_save: Sequence[str] | None = None) -> SelectiveLoRAConfig:
        """Return the adapter config of the methods selective and lora; for lora every block is active for good.

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

    def workers(self) -> int:
        """Return how many processes read images."""
        if self.num_workers is not None:
            return self.num_workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(4, cores)

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
                hint = f"near names are {', '.join(map(repr, near))}" if near else f"known are {', '.join(known)}"
                raise ConfigError(f"setting {name!r} is unknown; {hint}")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> TrainSettings:
        """Read a YAML mapping of settings; `overrides` go before it.

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


def _require(name: str, value: object, holds: bool, remedy: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={shown(value)} is out of range; {remedy}")


def shown(value: object) -> str:
    """Return `value` for a message: of one that is long its beginning."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of about {round(value.bit_length() * math.log10(2))} digits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` asks for. Strings become numbers and lists: YAML reads 1e-3 as one, flags are some."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, str) and list[str] in options and _NAMES.fullmatch(value) and value != "all-linear":
        return [entry.strip() for entry in value.split(",")]
    if int in options and float in options and _is_share(value):
        # 1 is one of them, 1.0 all.
        options = tuple(option for option in options if option is not int)
    for option in options:
        converted = _converted(value, option)
        if converted is not None or (value is None and option is type(None)):
            return converted
    raise ConfigError(f"{name}={shown(value)} is not {' or '.join(_described(option) for option in options)}")


def _is_share(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, str) and not value.strip().lstrip("+-").isdigit())


def _converted(value: Any, option: Any) -> Any:
    """`value` as `option`, or None where it is not one."""
    if get_origin(option) is Literal:
        return value if value in get_args(option) else None
    if get_origin(option) is list:
        names = isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value)
        return list(value) if names else None
    if option == dict[str, Scalar]:
        return arguments(value)
    if get_origin(option) is dict:
        return _converted_mapping(value, get_args(option)[1])
    if option is str:
        return value if isinstance(value, str) else None
    if option is bool:
        return value if isinstance(value, bool) else None
    if option in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        if option is int and isinstance(value, int):
            return value
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return None
        if option is float:
            return number
        return int(number) if number.is_integer() else None
    return None


def _converted_mapping(value: Any, kind: Any) -> dict[str, Any] | None:
    """A mapping, or its form as a flag, "name=number,name=number", with `kind` values; None where it is neither."""
    if isinstance(value, str):
        pairs = [entry.rpartition("=")[::2] for entry in value.split(",")]
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        return None
    entries = {str(name).strip(): _converted(number, kind) for name, number in pairs}
    return None if "" in entries or None in entries.values() else entries


def _described(option: Any) -> str:
    if get_origin(option) is Literal:
        return " or ".join(repr(choice) for choice in get_args(option))
    if get_origin(option) is list:
        return "a list of names"
    if option == dict[str, Scalar]:
        return "arguments with scalar values, such as drop_path_rate=0.1,qk_norm=true"
    if get_origin(option) is dict:
        return "a mapping such as qkv=8,fc2=32"
    return {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "unset"}[option]
