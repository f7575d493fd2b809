"""`feature_drift`: how far each block alone moves the final features of a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from slora.layers import adapted_layers
from slora.module_tree.modes import evaluating
from slora.retention.distillation import base_features, features_of
from slora.retention.term import at_least_fp32, checked_samples
from slora.selection.solo_gain import one_block


@torch.no_grad()
def feature_drift(
    model: nn.Module,
    samples: Tensor,
    *,
    features: Callable[[Tensor], Tensor] | None = None,
    every_block: bool = False,
) -> dict[str, Tensor]:
    """Return the drift of the final features with each block alone, `{layer: [blocks]}`; of an inactive one 0.

    `mean_z ||f_i(z) - f_base(z)||^2 / mean_z ||f_base(z) - mean f_base||^2`, where `f_i` has block i alone: what
    `Distillation` measures of all blocks together. Costs a forward pass over `samples` per active block.

    Args:
        model: adapted by `slora.inject`; not a wrapper around it.
        samples: inputs `[n, ...]`, n at least 2.
        features: `samples -> [n, d]`; by default the final features.
        every_block: measure inactive blocks, too.

    Raises:
        ConfigError: a value is out of range, or slora does not find final features in the model.
        StateError: the model is merged.
    """
    samples, features = checked_samples(samples, model), features_of(model, features)
    base, scale = base_features(model, features, samples)
    layers = dict(adapted_layers(model))
    on = {name: range(layer.blocks) if every_block else layer.activity().active for name, layer in layers.items()}
    found = {name: base.new_zeros(layer.blocks) for name, layer in layers.items()}
    with evaluating(model), one_block(list(layers.values())) as switch:
        for name, layer in layers.items():
            for i in on[name]:
                switch((layer, i))
                after = torch.cat([at_least_fp32(features(chunk)) for chunk in samples.split(256)])
                found[name][i] = (after - base).square().sum(1).mean() / scale
    return found
