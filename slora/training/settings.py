"""`TrainSettings`: every knob of a run, checked when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from slora.config import Inactive, SelectiveLoRAConfig
from slora.errors import ConfigError

# One or more module names or endings, separated by commas. Anything else is a regular expression.
_NAMES = re.compile(r"\s*[\w.-]+(\s*,\s*[\w.-]+)*\s*")

Method = Literal["selective", "lora", "full", "linear"]

# Low enough that no score a gate can take switches a block off.
ALWAYS_ACTIVE = -1e9


def _knob(default: Any, help: str) -> Any:
    """A field with the sentence that stands for it in `slora finetune --help`."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainSettings:
    """Every knob of a run. `slora finetune` has a flag for each; `config.yaml` of a run directory holds them all.

    Each field's sentence stands beside it. Fields that `slora.SelectiveLoRAConfig` has too mean the same.
    Shares are of the run's optimizer steps, from 0 to 1. `model`, `pretrained`, `data`, `data_root`, `download`
    and `augment` are read by the command line and ignored by `slora.training.train`, which gets objects.

    Raises:
        ConfigError: a value is out of range or of the wrong type; names the field, the value and what is allowed.
    """

    model: str | None = _knob(
        None, "Model: timm/NAME, open_clip/ARCH, open_clip/ARCH:PRETRAINED or demo/letters_vit."
    )
    pretrained: bool = _knob(False, "Start from the model's pretrained weights.")
    data: str | None = _knob(None, "Data set: a name such as cifar100, or imagefolder:PATH.")
    data_root: str = _knob("data", "Folder that holds downloaded data sets.")
    download: bool = _knob(True, "Download the data set where it is missing.")
    augment: Literal["auto", "none", "crop", "crop-flip"] = _knob(
        "auto", "Random crops and mirror images of training data; auto: what suits the data set."
    )

    method: Method = _knob(
        "selective", "selective: gated LoRA blocks; lora: all blocks, no gates; full: all weights; linear: the head."
    )
    r: int = _knob(16, "Rank of every LoRA block.")
    lora_alpha: float = _knob(16.0, "Numerator of the scaling lora_alpha / r.")
    lora_dropout: float = _knob(0.0, "Probability of dropping an input element of the LoRA path.")
    target_modules: str | list[str] = _knob(
        "all-linear", "Layers to adapt: all-linear, a regular expression, or name endings separated by commas."
    )
    exclude_modules: str | list[str] | None = _knob(None, "Layers to leave alone, given like target_modules.")
    modules_to_save: list[str] | None = _knob(
        None, "Modules trained in full and saved with the adapter; unset: the classifier head."
    )
    use_rslora: bool = _knob(False, "Scale by lora_alpha / sqrt(r) instead.")
    blocks: int | Literal["auto"] = _knob(
        "auto", "LoRA blocks per layer; auto: three on a fused qkv projection, else one."
    )
    threshold: float = _knob(0.1, "A block is active while its gate is at least this.")
    gate_init: float = _knob(0.15, "Gate of every block at the start.")
    inactive: Inactive = _knob(
        "probe", "What inactive blocks still learn: exact (all), probe (an estimate, nearly free), frozen (nothing)."
    )
    probe_every: int = _knob(10, "Optimizer steps between two probes.")
    probe_rows: int = _knob(512, "Rows of a layer's input that a probe reads.")
    base_dtype: str | None = _knob(None, "Dtype of the frozen weights, such as bfloat16; unset: as they are.")

    penalty: float = _knob(1.0, "Weight of the mean |gate| that is added to the loss.")
    penalty_warmup: float = _knob(0.1, "Share of the steps without penalty.")
    penalty_ramp: float = _knob(0.0, "Share of the steps over which the penalty then rises to its full weight.")
    gate_rule: Literal["proximal", "sgd"] = _knob(
        "proximal", "Gates' own update: proximal (gradient step, then soft threshold) or sgd (penalty in the loss)."
    )
    gate_lr: float = _knob(1e-2, "Learning rate of the gates.")

    epochs: int = _knob(10, "Passes over the training data.")
    max_steps: int | None = _knob(None, "Optimizer steps of the run; overrides epochs.")
    batch_size: int = _knob(128, "Images per forward pass and process.")
    gradient_accumulation: int = _knob(1, "Forward passes per optimizer step.")
    optimizer: Literal["adamw", "sgd"] = _knob("adamw", "Rule for everything but the gates.")
    lr: float = _knob(1e-3, "Highest learning rate; cosine schedule with linear warm-up.")
    min_lr_ratio: float = _knob(0.0, "Learning rate at the end, as a share of the highest.")
    warmup: float = _knob(0.05, "Share of the steps over which the learning rate rises.")
    weight_decay: float = _knob(0.01, "Decoupled weight decay of matrices; gates, biases and norms have none.")
    momentum: float = _knob(0.9, "Momentum of the sgd optimizer.")
    clip_norm: float = _knob(1.0, "Largest norm of the gradient, of the gates' apart from the rest; 0: no clipping.")
    label_smoothing: float = _knob(0.0, "Share of the target spread over all classes.")
    precision: Literal["auto", "fp32", "bf16"] = _knob(
        "auto", "Arithmetic of the model; auto: bf16 where the GPU supports it. Trained weights stay fp32."
    )
    device: Literal["auto", "cpu"] = _knob("auto", "auto: the GPU where there is one.")
    seed: int = _knob(0, "Seed of initial weights, order of images, augmentation and dropout.")
    num_workers: int = _knob(4, "Processes that read images; 0: read in the training process.")

    eval_batch_size: int = _knob(256, "Images per forward pass of an evaluation.")
    eval_every: int | None = _knob(None, "Steps between evaluations; unset: every epoch; 0: only at the end.")
    log_every: int = _knob(10, "Steps between lines of metrics.jsonl.")
    save_every: int | None = _knob(None, "Steps between checkpoints; unset: every epoch; 0: only at the end.")
    keep_last: int = _knob(2, "Checkpoints to keep, besides the most accurate.")
    tensorboard: bool = _knob(True, "Write TensorBoard events.")
    progress: bool = _knob(True, "Show a progress bar.")
    count_flops: bool = _knob(True, "Count the FLOPs of training.")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _typed(f.name, getattr(self, f.name), hints[f.name]))
        for name in ("epochs", "batch_size", "gradient_accumulation", "eval_batch_size", "log_every", "keep_last"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "use 1 or more")
        for name in ("max_steps",):
            _require(name, getattr(self, name), (getattr(self, name) or 1) >= 1, "use 1 or more, or leave it out")
        for name in ("seed", "num_workers", "eval_every", "save_every"):
            _require(name, getattr(self, name), (getattr(self, name) or 0) >= 0, "use 0 or more")
        for name in ("penalty", "gate_lr", "lr", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            _require(name, value, math.isfinite(value) and value >= 0, "use a finite number from 0 up")
        for name in ("penalty_warmup", "penalty_ramp", "warmup", "min_lr_ratio"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "use a share from 0 to 1")
        for name in ("momentum", "label_smoothing"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "use a number from 0 to below 1")
        self.lora_config()

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


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: the file is missing or unreadable, or holds something else.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; give the path of a YAML file with settings") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML ({' '.join(str(error).split())})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; expected lines such as `lr: 0.001`")
    return values


def _require(name: str, value: object, holds: bool, remedy: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value!r} is out of range; {remedy}")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` asks for. Strings become numbers and lists: YAML reads 1e-3 as one, flags are some."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, str) and list[str] in options and _NAMES.fullmatch(value) and value != "all-linear":
        return [entry.strip() for entry in value.split(",")]
    for option in options:
        converted = _converted(value, option)
        if converted is not None or (value is None and option is type(None)):
            return converted
    raise ConfigError(f"{name}={value!r} is not {' or '.join(_described(option) for option in options)}")


def _converted(value: Any, option: Any) -> Any:
    """`value` as `option`, or None where it is not one."""
    if get_origin(option) is Literal:
        return value if value in get_args(option) else None
    if get_origin(option) is list:
        names = isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value)
        return list(value) if names else None
    if option is str:
        return value if isinstance(value, str) else None
    if option is bool:
        return value if isinstance(value, bool) else None
    if option in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            return None
        if option is float:
            return number
        return int(number) if number.is_integer() else None
    return None


def _described(option: Any) -> str:
    if get_origin(option) is Literal:
        return " or ".join(repr(choice) for choice in get_args(option))
    if get_origin(option) is list:
        return "a list of names"
    return {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "unset"}[option]
