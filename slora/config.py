"""`SelectiveLoRAConfig`: every choice that shapes an adapter, checked when it is made."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from slora.errors import ConfigError
from slora.io.plain import plain, plain_mapping, plain_names, shown

if TYPE_CHECKING:
    import torch

Inactive = Literal["exact", "probe", "frozen"]
Unit = Literal["blocks", "parameters", "flops", "ranks"]
# The towers of a CLIP.
Tower = Literal["image", "text", "both"]

# (share of the steps in which every block is trained, share after the choice is made): of `slora.selection.Budget` and
# of `Gates`. Here, so that settings are checked without importing torch.
LEAST_SETTLING = 1 / 3
BUDGET_PHASES = (0.3, 0.6)
GATES_PHASES = (0.1, LEAST_SETTLING)
# Of the rank-wise strategies.
SORA_PHASES = (0.0, LEAST_SETTLING)
CODYRA_PHASES = (1 / 3, LEAST_SETTLING)
ADALORA_PHASES = (0.1, 0.4)
INCRELORA_PHASES = (0.1, 0.5)

# The largest number of fp32.
LARGEST = 3.4028234663852886e38

# Exponents of the prices in `slora.selection.SoloGain`: on depth without old samples, on drift with them.
DEPTH_PRICE, DRIFT_PRICE = 0.75, 0.5


def phase_ends(steps: int, warmup: float, settling: float) -> tuple[int, int]:
    """Return the steps after which selection begins and after which the active blocks are final."""
    # Even a run of one step makes its choice.
    last = max(1, steps - math.ceil(settling * steps - 1e-9))
    return min(round(warmup * steps), last), last


@dataclass
class SelectiveLoRAConfig:
    """Which layers are adapted, with what rank, and how their blocks are selected.

    Fields that PEFT's `LoraConfig` has too carry the same name and meaning. NumPy and PyTorch numbers are converted to
    Python's, collections of names to lists.

    Args:
        r: rank of every block, 1 to 256; at most min(in_features, out_features) of its layer.
        lora_alpha: numerator of the scaling `lora_alpha / r` (`/ sqrt(r)` with `use_rslora`).
        lora_dropout: probability with which an input element of the LoRA path is dropped in training.
        target_modules: "all-linear" (every linear layer but the output head), a regular expression that
            must match the whole module name, or names and name endings ("qkv", "attn.proj") in any collection.
        exclude_modules: the same, for modules to leave alone.
        modules_to_save: names or name endings of modules that are trained in full and saved with the
            adapter, such as a new classifier head, or of single parameters, such as CLIP's "logit_scale". Modules of
            16 bits are kept in fp32, and so are scalars; `slora.unload` and `merge_and_unload` give the dtype back.
        rank_pattern: {regular expression on the end of a module name: rank}, overriding `r`.
        alpha_pattern: the same for `lora_alpha`.
        use_rslora: scale by `lora_alpha / sqrt(r)` (arXiv 2312.03732).
        threshold: a block is active while `gate >= threshold`. 0.1 is TAPS' published value; the value
            used in arXiv 2501.15377 is not known to us.
        gate_init: initial score of every block; 0.15 is TAPS' published value, with the same caveat. Under
            `inactive="frozen"` at least `threshold`.
        blocks: "auto" (a fused qkv projection gets three blocks, everything else one) or a number that
            divides `out_features` of every adapted layer.
        inactive: what happens to the gate of an inactive block. "exact": its straight-through gradient
            is computed at every step. "probe": an unbiased estimate from `probe_rows` random rows every
            `probe_every` steps, nearly free. "frozen": none; an inactive block stays inactive for good.
            What torch.compile or a CUDA graph records probes at every step.
        probe_every: optimizer steps between two probes; the estimate is scaled by it.
        probe_rows: rows of the input that a probe reads; all of them where there are fewer.
        base_dtype: dtype in which the frozen base weights of adapted layers are kept, such as
            `torch.bfloat16` to halve their memory under bf16 autocast; None leaves them as they are.

    Raises:
        ConfigError: a value is out of range; the message names the field, the value and what is allowed.
    """

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | Collection[str] = "all-linear"
    exclude_modules: str | Collection[str] | None = None
    modules_to_save: Collection[str] | None = None
    rank_pattern: Mapping[str, int] | None = field(default=None)
    alpha_pattern: Mapping[str, float] | None = field(default=None)
    use_rslora: bool = False
    threshold: float = 0.1
    gate_init: float = 0.15
    blocks: int | Literal["auto"] = "auto"
    inactive: Inactive = "probe"
    probe_every: int = 10
    probe_rows: int = 512
    base_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            setattr(self, name, plain_names(name, getattr(self, name), "neither a string nor a list of names"))
        self.modules_to_save = plain_names("modules_to_save", self.modules_to_save, "not a list of names")
        for entry in dataclasses.fields(self):
            setattr(self, entry.name, plain_mapping(plain(getattr(self, entry.name))))
        _check_rank("r", self.r)
        for name, example in (("rank_pattern", '{"qkv": 8}'), ("alpha_pattern", '{"qkv": 16.0}')):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping):
                raise ConfigError(f"{name}={value!r} is not a mapping from patterns to numbers, such as {example}")
        for pattern, rank in (self.rank_pattern or {}).items():
            _check_pattern("rank_pattern", pattern)
            _check_rank(f"rank_pattern[{pattern!r}]", rank)
        _check_alpha("lora_alpha", self.lora_alpha)
        for pattern, alpha in (self.alpha_pattern or {}).items():
            _check_pattern("alpha_pattern", pattern)
            _check_alpha(f"alpha_pattern[{pattern!r}]", alpha)
        if not _is_finite(self.lora_dropout) or not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout={shown(self.lora_dropout)} is not a probability below 1; use 0.0 for none")
        for name in ("threshold", "gate_init"):
            value = getattr(self, name)
            if not _is_finite(value):
                raise ConfigError(
                    f"{name}={shown(value)} is not a finite number; the published values are 0.1 and 0.15"
                )
            # PyTorch compares and fills with no integer beyond 64 bits.
            setattr(self, name, float(value))
        if self.blocks != "auto" and (not _is_int(self.blocks) or self.blocks < 1):
            raise ConfigError(f'blocks={shown(self.blocks)} is neither a positive integer nor "auto"')
        if self.inactive not in get_args(Inactive):
            raise ConfigError(f"inactive={self.inactive!r} is unknown; use one of {', '.join(get_args(Inactive))}")
        if self.inactive == "frozen" and self.gate_init < self.threshold:
            raise ConfigError(
                f"gate_init={self.gate_init!r} is below threshold={self.threshold!r}, so that under inactive='frozen' "
                f"every block would be off from the start and for good; raise gate_init to {self.threshold!r} or "
                f"more, or use inactive='probe'"
            )
        for name in ("probe_every", "probe_rows"):
            if not _is_int(getattr(self, name)) or not 1 <= getattr(self, name) < 2**31:
                raise ConfigError(f"{name}={shown(getattr(self, name))} is not a positive integer below 2**31")
        if not isinstance(self.use_rslora, bool):
            raise ConfigError(f"use_rslora={self.use_rslora!r} is neither True nor False")
        if self.base_dtype is not None:
            _check_dtype("base_dtype", self.base_dtype)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "all-linear":
                _check_pattern(name, value)
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            for entry in getattr(self, name) or ():
                if not isinstance(entry, str):
                    raise ConfigError(f"{name} holds {entry!r}, which is not a name; use a list of strings")
        if not self.target_modules:
            raise ConfigError('target_modules is empty; use "all-linear", a regular expression or a list of names')
        if isinstance(self.modules_to_save, str):
            raise ConfigError(
                f'modules_to_save={self.modules_to_save!r} is a string; use a list: ["{self.modules_to_save}"]'
            )

    def rank_of(self, name: str) -> int:
        """Return the rank for the module `name`: the first matching entry of `rank_pattern`, else `r`."""
        return int(_first_match(self.rank_pattern, name, self.r))

    def alpha_of(self, name: str) -> float:
        """Return `lora_alpha` for the module `name`, `alpha_pattern` considered."""
        return float(_first_match(self.alpha_pattern, name, self.lora_alpha))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-serialisable values; `from_dict` reads them back."""
        fields = {f.name: copy.copy(getattr(self, f.name)) for f in dataclasses.fields(self)}
        if self.base_dtype is not None:
            fields["base_dtype"] = str(self.base_dtype).removeprefix("torch.")
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SelectiveLoRAConfig:
        """Build a config from `to_dict`'s result.

        Raises:
            ConfigError: a field is unknown (the message lists it), or a value is out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ConfigError(f"unknown config fields {unknown}; known are {sorted(known)}")
        values = dict(fields)
        if isinstance(values.get("base_dtype"), str):
            values["base_dtype"] = _dtype_named("base_dtype", values["base_dtype"])
        return cls(**values)


def scaling(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """Return `c`, the factor in front of `S @ B.T`."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def matches_pattern(pattern: str, name: str) -> bool:
    """Whether an entry of `rank_pattern` or `alpha_pattern` is about the module `name`: its end, as in PEFT."""
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def check_budget(budget: object, unit: str, n: int | None = None) -> int | float:
    """Check a budget, against the number of blocks or ranks `n` where that is known; return it as an int or a float.

    Raises:
        ConfigError: names the budget, its value and what is allowed.
    """
    if unit not in get_args(Unit):
        raise ConfigError(f"unit={unit!r} is unknown; use one of {', '.join(get_args(Unit))}")
    budget = plain(budget)
    what = unit if unit == "ranks" else "blocks"
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise ConfigError(f"budget={budget!r} is neither a number of {what}, such as 4, nor a share, such as 0.1")
    if isinstance(budget, float):
        if not 0 <= budget <= 1:
            raise ConfigError(
                f"budget={budget} is a share, so from 0.0 to 1.0; for a number of {what} write it without a point, "
                f"such as 4"
            )
        if unit == what and n is not None and budget > 0 and math.floor(budget * n + 0.5) == 0:
            raise ConfigError(
                f"budget={budget} of {n} {what} rounds to none; the smallest share that keeps one is "
                f"{rounded_up(0.5 / n)}, or write 0 for none"
            )
        return budget
    if unit != what:
        raise ConfigError(f"budget={shown(budget)} counts blocks, but unit={unit!r} wants a share, such as 0.1")
    if budget < 0 or (n is not None and budget > n):
        allowed = "0 or more" if n is None else f"0 to {n}, the number of {what}, or a share such as 0.1"
        raise ConfigError(f"budget={shown(budget)} {what} is out of range; use {allowed}")
    return budget


def rounded_up(share: float) -> str:
    """Return a positive share with four significant digits, rounded up."""
    digits = 3 - math.floor(math.log10(share))
    return f"{math.ceil(share * 10**digits) / 10**digits:.{digits}f}"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    # Finite in fp32 as well, the dtype of the gates.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def _check_rank(name: str, value: object) -> None:
    if not _is_int(value) or not 1 <= value <= 256:  # type: ignore[operator]
        raise ConfigError(f"{name}={shown(value)} is not a rank; use an integer from 1 to 256")


def _check_alpha(name: str, value: float) -> None:
    if not _is_finite(value) or value <= 0:
        raise ConfigError(f"{name}={shown(value)} is not a positive finite number")


def _check_dtype(name: str, value: object) -> None:
    # Imported here and below, because everything else in a config can be checked without torch.
    import torch

    if value not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(
            f"{name}={value!r} is not a floating-point torch.dtype of 16 bits or more, such as torch.bfloat16"
        )


def _dtype_named(name: str, value: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, value, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{name}={value!r} is not the name of a torch dtype; use bfloat16, float16 or float32")
    return dtype


def _check_pattern(name: str, pattern: object) -> None:
    if not isinstance(pattern, str):
        raise ConfigError(f"{name} holds {pattern!r}, which is not a regular expression; use a string")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{name}: {pattern!r} is not a regular expression ({error})") from error


def _first_match(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    return next((value for pattern, value in (patterns or {}).items() if matches_pattern(pattern, name)), default)
