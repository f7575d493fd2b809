"""The images of `replay_data` with their labels, and the pretrained head that classifies them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from slora.errors import ConfigError
from slora.models.features import final_features
from slora.models.input_spec import InputSpec
from slora.models.targets import head_names
from slora.module_tree.wrappers import module_at
from slora.retention import Replay, Term
from slora.runs.settings import TrainSettings
from slora.sources import models
from slora.sources.data import open_data
from slora.sources.data_names import check_replayed
from slora.training.make_terms import Terms
from slora.training.retain_images import spread_over
from slora.training.run_model import rebuild


def replay_terms(settings: TrainSettings, spec: InputSpec) -> Terms | None:
    """Return what makes the term of `replay_data`, or None without it.

    Up to `retain_samples` images, spread evenly over the training part of the data set, are classified by the head of
    the pretrained model, which stays as it is.

    Raises:
        ConfigError: `replay_data` is not a data set, or the model has no pretrained head for its classes.
        DataError: the data set cannot be opened, or has fewer than two readable images.
    """
    name, weight = settings.replay_data, settings.replay_weight
    if name is None or not weight:
        return None
    other = open_data(check_replayed(name), settings.data_root, settings.download)
    classes = len(other.classes)
    assert settings.model is not None
    if not settings.pretrained or models.new_head(settings.model, settings.pretrained, classes):
        raise ConfigError(
            f"replay_data={name!r} has {classes} classes, and {settings.model} has no pretrained head for them; name "
            f"the data set of its pretraining and set pretrained, or use retain_data, which needs no head and no labels"
        )
    old = rebuild(settings, classes).model
    heads = list(dict.fromkeys(head_names(old)))
    if len(heads) != 1:
        raise ConfigError(f"replay_data={name!r} needs a model with one head; {settings.model} has {heads or 'none'}")
    images, labels = spread_over(other.data(spec, training=True), settings.retain_samples, f"replay_data={name!r}")
    head = module_at(old, heads[0]).eval().requires_grad_(False)

    def made(model: nn.Module) -> Sequence[Term]:
        features = final_features(model)
        head.to(next(model.parameters()).device)
        return [
            Replay(model, images, torch.tensor(labels), weight, predict=lambda z: head(features(z)), seed=settings.seed)
        ]

    return made
