"""The head of a run, and which other settings it takes. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from slora.errors import ConfigError
from slora.io.plain import shown

Head = Literal["linear", "zero-shot"]
Loss = Literal["cross-entropy", "contrastive"]


def is_contrastive(settings: Mapping[str, Any]) -> bool:
    """Whether a run trains on the contrastive loss: by default if it trains the text tower."""
    loss: str | None = settings["loss"]
    return settings["head"] == "zero-shot" and (loss or _default(settings["tower"])) == "contrastive"


def _default(tower: str) -> str:
    return "cross-entropy" if tower == "image" else "contrastive"


def check_head(settings: Mapping[str, Any], unit: str) -> None:
    """Check that the head of `settings` takes the settings that are given with it.

    Args:
        unit: what the budget of the run counts or is a share of.

    Raises:
        ConfigError: names the setting, its value and the remedy.
    """
    tower, loss = settings["tower"], settings["loss"]
    if settings["head"] == "linear":
        if tower != "image":
            raise ConfigError(f"tower={tower!r} needs head='zero-shot'; a linear head reads the image tower alone")
        if loss == "contrastive":
            raise ConfigError("loss='contrastive' needs head='zero-shot'; a linear head has no prompts")
        for name in ("templates", "class_names"):
            if settings[name] is not None:
                raise ConfigError(
                    f"{name}={settings[name]!r} needs head='zero-shot'; a linear head has no prompts: leave it out"
                )
        return
    if settings["method"] == "linear":
        raise ConfigError("method='linear' trains a linear head, of which head='zero-shot' has none; use head='linear'")
    if settings["head_first"]:
        raise ConfigError(
            f"head_first={settings['head_first']} needs head='linear'; a zero-shot head is not new: leave it out"
        )
    if is_contrastive(settings) and settings["label_smoothing"]:
        raise ConfigError(
            f"label_smoothing={shown(settings['label_smoothing'])} needs loss='cross-entropy'; the contrastive loss "
            f"has none"
        )
    if is_contrastive(settings) and settings["batch_size"] < 2:
        raise ConfigError(
            f"batch_size={settings['batch_size']} has no negatives, which loss='contrastive' needs; use 2 or more"
        )
    if tower == "text" and settings["retain_data"] is not None:
        raise ConfigError(
            f"retain_data={settings['retain_data']!r} keeps the image embeddings, which tower='text' does not change; "
            f"leave it out"
        )
    if settings["replay_data"] is not None:
        raise ConfigError(
            f"replay_data={settings['replay_data']!r} needs a pretrained linear head, of which a CLIP has none; use "
            f"retain_data, which needs no head"
        )
    for name in ("drift_penalty", "ewc_penalty", "log_drift"):
        if tower != "image" and settings[name]:
            raise ConfigError(
                f"{name}={shown(settings[name])} is measured on images, which do not reach the layers of the text "
                f"tower; leave it out, or use tower='image'"
            )
    if tower != "image" and not is_contrastive(settings) and unit == "flops":
        raise ConfigError(
            f"budget_unit='flops' with tower={tower!r} needs loss='contrastive'; with cross-entropy the rows of the "
            f"text tower depend on the number of classes: use budget_unit='parameters'"
        )
