"""The model of a run before and after fine-tuning, as what an evaluation needs of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from slora.clip import Clip, ClipClassifier, PromptedClip
from slora.clip.prompts import Prompts, templates
from slora.errors import ConfigError
from slora.evaluation.grouped import GroupedLogits
from slora.models.input_spec import InputSpec
from slora.runs.settings import TrainSettings
from slora.sources import models
from slora.sources.data import Source
from slora.sources.eval_sets import EvalSet
from slora.sources.imagenet import class_names, outputs
from slora.sources.model_names import is_clip
from slora.training.run_model import rebuild


class Evaluated(NamedTuple):
    """A model in one state."""

    model: nn.Module
    """For its final features."""
    head: nn.Module | None
    """`images -> logits` of the run's classes; None before fine-tuning if its head is new."""
    clip: Clip | None
    """Both towers of a CLIP."""


class Classifiers:
    """Classifiers of evaluation sets, made of the model of a run.

    Args:
        settings: of the run.
        own: its data set.
    """

    def __init__(self, settings: TrainSettings, own: Source) -> None:
        self.settings, self.own = settings, own
        self.outputs = outputs(own.name, own.classes)

    def check(self, sets: Sequence[EvalSet]) -> None:
        """Refuse sets of ImageNet's classes that the model cannot classify.

        Raises:
            ConfigError: names the set.
        """
        for each in sets:
            if self.outputs is None and not is_clip(self.settings.model):
                raise ConfigError(
                    f"{each.name} needs a head with ImageNet's classes or a CLIP, but the run is of "
                    f"{self.settings.model} with the {len(self.own.classes)} classes of {self.own.name}"
                )
            missing = [n for group in each.groups or () for n in group if n not in (self.outputs or {n: n})]
            if missing:
                raise ConfigError(
                    f"{each.name} has the class {class_names()[missing[0]]!r}, which is none of the "
                    f"{len(self.own.classes)} classes of {self.own.name}"
                )

    def task(self, suite: EvalSet) -> str:
        """Return what a suite is to the run: "id", "ood", or "zero-shot" if it did not train on ImageNet's classes."""
        if self.outputs is None:
            return "zero-shot"
        return "id" if suite.name == "imagenet" else "ood"

    def of_suite(self, state: Evaluated, suite: EvalSet) -> nn.Module | None:
        """Return the classifier of a suite, or None if the model has none: its head is new."""
        assert suite.groups is not None
        if self.outputs is None:
            head: nn.Module | None = self._prompted(state, class_names(), ())
            groups = suite.groups
        else:
            head, known = state.head, self.outputs
            groups = tuple(tuple(known[number] for number in group) for group in suite.groups)
        return None if head is None else GroupedLogits(head, groups)

    def zero_shot(self, state: Evaluated, images: EvalSet) -> nn.Module:
        """Return the zero-shot classifier of a set."""
        return self._prompted(state, images.classes, images.templates)

    def _prompted(self, state: Evaluated, names: Sequence[str], own_templates: Sequence[str]) -> nn.Module:
        assert state.clip is not None
        prompts = Prompts(tuple(names), tuple(own_templates) or templates(None, state.clip.templates))
        return PromptedClip(state.clip, prompts, trains_text=False, contrastive=False)


def before_and_after(
    model: nn.Module, settings: TrainSettings, own: Source, spec: InputSpec
) -> tuple[Evaluated, Evaluated]:
    """Return the initial model of a run, built again, and `model`, which holds its result."""
    initial = rebuild(settings, len(own.classes)).model
    if isinstance(model, PromptedClip):
        first, last = (Clip(each, model.tokenizer, spec, model.prompts.templates) for each in (initial, model.clip))
        return _prompted(first, model.prompts), _prompted(last, model.prompts)
    new = models.new_head(settings.model or "", settings.pretrained, len(own.classes))
    before = Evaluated(initial, None if new else initial, None)
    after = Evaluated(model, model, None)
    if isinstance(model, ClipClassifier):
        before = before._replace(clip=_with_tower(settings, initial))
        after = after._replace(clip=_with_tower(settings, model))
    return before, after


def _prompted(clip: Clip, prompts: Prompts) -> Evaluated:
    return Evaluated(clip.model, PromptedClip(clip, prompts, trains_text=False, contrastive=False), clip)


def _with_tower(settings: TrainSettings, model: nn.Module) -> Clip:
    """The CLIP of a run with the image tower of `model`."""
    clip = models.build_clip(settings.model or "", settings.pretrained, settings.img_size, settings.model_args)
    clip.model.visual = model.visual
    return clip
