"""`LocalDrift`: how far each block moves the outputs of its own layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from slora.errors import ConfigError
from slora.io.plain import count_of
from slora.layers import LoRABlocks, adapted_layers
from slora.layers.inputs import recorded_inputs
from slora.models.disabled import disabled
from slora.module_tree.modes import evaluating
from slora.retention.term import Term, at_least_fp32, checked_samples, refuse_sharded, seed_of


class _Rows(NamedTuple):
    """Inputs of some blocks of a layer in the base model, `x [m, K]`, and the mean `||W_i x||^2` of each block."""

    x: Tensor
    power: Tensor


class LocalDrift(Term):
    """A loss term: the drift of the outputs of each active block, summed over the blocks.

    With `S = x A^T [m, r]` over m fixed rows x of the layer's input in the base model, the drift of a block is

        c^2 ||S B^T||_F^2 / m = c^2 tr((S^T S) (B^T B)) / m

    per row, divided by `||x W^T||_F^2 / m` of the same outputs. x does not follow the blocks before it, and the
    indicator counts as a constant, so that gates get no gradient.

    Costs, of each active block in a step, the product S (`rows x K x r`, and again for A's gradient) and products of
    `r x r` and `N / blocks x r x r`: for a ViT-B of rank 16 about 1 GFLOP, 0.01 % of a step with 128 images. Once, a
    forward pass over `samples`; then `rows x K` numbers of memory per layer.

    Args:
        model: adapted by `slora.inject`; not a wrapper around it.
        samples: inputs `[n, ...]`, n at least 2, of the old data, of proxies (`generic_samples`), or of the new data.
        weight: of the loss term.
        rows: of each layer's input, drawn from those that the samples give; all if there are fewer.
        every: only every so many steps have the term, with a weight `every` times as large.
        seed: of the draw.
        run: runs the model on samples; by default `model(samples)`. A layer that this does not reach has no term.

    Raises:
        ConfigError: a value is out of range, an input of a layer is not finite, or no adapted layer is reached.
        StateError: the model is merged or sharded.
    """

    name = "local drift"

    def __init__(
        self,
        model: nn.Module,
        samples: Tensor,
        weight: float = 1.0,
        *,
        rows: int = 256,
        every: int = 1,
        seed: int = 0,
        run: Callable[[Tensor], object] | None = None,
    ) -> None:
        super().__init__(model, weight, every)
        refuse_sharded(model, self.name)
        self.samples, rows = checked_samples(samples, model), count_of("rows", rows)
        self.layers = dict(adapted_layers(model))
        self.rows = _recorded(
            model, self.layers, self.samples, rows, seed_of("seed", seed), model if run is None else run
        )

    def value(self, draw: int) -> Tensor:
        """Return the sum over the active blocks; `draw` does not matter."""
        terms = []
        for name, rows in self.rows.items():
            layer = self.layers[name]
            active = layer.activity().active
            for blocks, entry in rows.items():
                on = [i for i in active if blocks[0] <= i < blocks[1]]
                if on:
                    terms.append(self._drift(layer, on, entry, blocks[0]).sum())
        return torch.stack(terms).sum() if terms else next(self.model.parameters()).new_zeros(())

    @torch.no_grad()
    def per_block(self, every_block: bool = False) -> dict[str, Tensor]:
        """Return the drift of each block, `{layer: [blocks]}`; of an inactive one 0, unless `every_block`."""
        found = {}
        for name, layer in self.layers.items():
            drift = found[name] = layer.lora_B.new_zeros(layer.blocks)
            on = range(layer.blocks) if every_block else layer.activity().active
            for (first, last), entry in self.rows.get(name, {}).items():
                mine = [i for i in on if first <= i < last]
                if mine and not layer.released:
                    drift[mine] = self._drift(layer, mine, entry, first)
        return found

    def _drift(self, layer: LoRABlocks, blocks: list[int], rows: _Rows, first: int) -> Tensor:
        """The drift of each of `blocks`, `[len(blocks)]`."""
        with torch.autocast(rows.x.device.type, enabled=False):
            A, B = layer.lora_A[blocks], layer.effective_B[blocks]
            S = (rows.x.to(A.dtype) @ A.flatten(0, 1).T).unflatten(1, A.shape[:2]).transpose(0, 1)
            drift = layer.scaling**2 * ((S.mT @ S) * (B.mT @ B)).sum((1, 2)) / len(rows.x)
            result: Tensor = drift / rows.power[[i - first for i in blocks]]
            return result


@torch.no_grad()
def _recorded(
    model: nn.Module, layers: dict[str, LoRABlocks], samples: Tensor, count: int, seed: int,
    run: Callable[[Tensor], object],
) -> dict[str, dict[tuple[int, int], _Rows]]:  # fmt: skip
    """About `count` rows of the inputs of each layer, by layer and by the range of blocks that they reach."""
    names = {layer: name for name, layer in layers.items()}
    found: dict[str, dict[tuple[int, int], list[Tensor]]] = {}
    generator = torch.Generator().manual_seed(seed)
    share = 1.0

    def record(layer: LoRABlocks, blocks: slice, x: Tensor) -> None:
        x = x.flatten(0, -2)
        chosen = torch.randperm(len(x), generator=generator)[: max(1, round(share * count))]
        kept = found.setdefault(names[layer], {}).setdefault((blocks.start, blocks.stop), [])
        kept.append(at_least_fp32(x[chosen.to(x.device)]))

    with evaluating(model), disabled(model), recorded_inputs(layers.values(), record):
        for chunk in samples.split(256):
            share = len(chunk) / len(samples)
            try:
                run(chunk)
            except RuntimeError as error:
                if not chunk.is_floating_point() or chunk.dtype in {p.dtype for p in model.parameters()}:
                    raise
                raise ConfigError(
                    f"samples are {chunk.dtype}, which the model does not take ({error}); convert them to the dtype of "
                    f"its weights, or give `run`"
                ) from error
    if not found:
        raise ConfigError("samples reach no adapted layer; give `run`, a function that runs the model on them")
    result: dict[str, dict[tuple[int, int], _Rows]] = {}
    for name, ranges in found.items():
        weight = layers[name].base_weight
        n = len(weight) // layers[name].blocks
        for (first, last), parts in ranges.items():
            x = torch.cat(parts)
            if not x.isfinite().all():
                raise ConfigError(
                    f"the input of {name!r} holds NaN or infinity in the base model, for some of the samples; remove "
                    f"those, or check the pretrained weights"
                )
            y = x @ weight[first * n : last * n].to(x.dtype).T
            power = y.square().unflatten(1, (last - first, n)).sum(2).mean(0)
            result.setdefault(name, {})[first, last] = _Rows(x, power.clamp(min=1e-12))
    return result
