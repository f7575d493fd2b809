"""Checks of the settings that keep what a model knew. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slora.errors import ConfigError
from slora.io.plain import shown

# They act on the LoRA blocks, or compare the model with them off.
OF_BLOCKS = ("retain_data", "replay_data", "drift_penalty", "l2_penalty", "ewc_penalty", "log_drift")


def check_retention(settings: Mapping[str, Any]) -> None:
    """Check that the method of a run has the blocks that its retention acts on.

    Raises:
        ConfigError: it has none; names the setting.
    """
    if settings["method"] in ("selective", "lora"):
        return
    for name in OF_BLOCKS:
        if settings[name]:
            raise ConfigError(
                f"{name}={shown(settings[name])} acts on LoRA blocks, but method={settings['method']!r} has none; use "
                f"method='selective' or 'lora'"
            )


def check_retained_data(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check that a run of the command line has the images that its retention needs.

    Raises:
        ConfigError: it has none; names the setting.
    """
    for name, data in (("retain_weight", "retain_data"), ("replay_weight", "replay_data")):
        if settings[data] is None and settings[name] != defaults[name]:
            flag = data.replace("_", "-")
            raise ConfigError(
                f"{name}={shown(settings[name])} has no effect without {data}; add --{flag}, or leave it out"
            )
    if settings["retain_data"] is not None:
        return
    if settings["ewc_penalty"]:
        raise ConfigError(
            f"ewc_penalty={settings['ewc_penalty']:g} needs images to find the important weights on; add some, such as "
            f"--retain-data generic"
        )
    if settings["drift_data"] == "retained":
        raise ConfigError(
            "drift_data='retained' needs images; add some with --retain-data, such as a folder of old ones"
        )
