"""One run: the pretrained model is adapted to functions, and asked for words before and after."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from examples.minilm.encoder import Retriever, embed, load_pretrained, model_folder
from examples.minilm.retrieval import Ids, info_nce, scores, scores_of, tasks
from slora.layers import adapted_layers
from slora.merging import merged
from slora.training import TrainSettings, prepare, train

# Settings of every run: 60 steps of 16 pairs see each training pair once. There is no head to train first.
COMMON: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "lr": 1e-3,
    "max_steps": 60,
    "batch_size": 16,
    "head_first": 0,
    "warmup": 0.1,
    "weight_decay": 0.0,
    "lr_hold": 0.4,
    "eval_every": 0,
    "log_every": 10,
    "device": "cpu",
    "precision": "fp32",
    "progress": False,
}
QUICK: dict[str, Any] = {"max_steps": 4, "batch_size": 4}
QUICK_PAIRS = 16


def minilm_run(
    settings: Mapping[str, Any],
    seed: int = 0,
    validation: bool = False,
    quick: bool = False,
    retain: bool = False,
    scales: Sequence[float] = (),
) -> dict[str, Any]:
    """Adapt the pretrained model once; return what it then finds, and what it has become.

    Args:
        settings: fields of `TrainSettings` beside `COMMON`, such as `{"strategy": "last", "budget": 4}`.
        seed: of the order of pairs and the initial blocks.
        validation: measure on functions for choosing settings, not on test functions.
        quick: a few steps on a few pairs, which show that everything works.
        retain: distil the embeddings of 64 glosses of words that are not tested.
        scales: factors of the update, each of which is measured as well (WiSE-FT, arXiv 2109.01903).

    Returns:
        `target` (recall@1 of functions, %), `target_10` (recall@10), `mrr`, `nll` (nats), `lost` (points of recall@1 of
        words), `drift` (of the embeddings of glosses, relative to their variance); `active` and all `blocks`, `ranks`
        and `kept` parameters of the result, `flops` of training (None but for seed 0), `seconds` of one processor;
        `scaled`: the first six again for each scale.

    Raises:
        MissingDependencyError: the model, WordNet or a library is missing; says how to get it.
    """
    data = tasks()
    if quick:
        data = {name: Ids(*(ids[:QUICK_PAIRS] for ids in pairs)) for name, pairs in data.items()}
    chosen = TrainSettings.from_dict(
        {**COMMON, **settings, **(QUICK if quick else {}), "seed": seed, "count_flops": seed == 0}
    )
    test, words = data["validation" if validation else "test"], data["words"]
    torch.manual_seed(seed)
    model = load_pretrained(model_folder())
    before = _before(quick)
    prepare(model, settings=chosen)
    pairs = data["training"].together()
    start = time.process_time()
    outcome = train(
        model,
        # Every pair is its own class.
        TensorDataset(pairs, torch.arange(len(pairs))),
        None,
        chosen,
        criterion=info_nce,
        retain=data["retained"].queries if retain else None,
    )
    seconds = time.process_time() - start
    layers = [layer for _, layer in adapted_layers(model)]
    ranks = {layer: layer.block_ranks() for layer in layers}
    return {
        **_measures(model, test, words, before),
        "active": sum(rank > 0 for each in ranks.values() for rank in each),
        "blocks": sum(layer.blocks for layer in layers),
        "ranks": sum(map(sum, ranks.values())),
        # A row of A and a column of B for each rank.
        "kept": sum(sum(each) * (layer.lora_A.shape[-1] + layer.lora_B.shape[-2]) for layer, each in ranks.items()),
        "flops": outcome.flops or None,
        "seconds": round(seconds, 2),
        "scaled": [{"scale": scale, **_measures(model, test, words, before, scale)} for scale in scales],
    }


@functools.lru_cache(2)
def _before(quick: bool) -> tuple[Tensor, float]:
    """The pretrained model's embeddings of glosses, and its recall@1 of words."""
    words = tasks()["words"]
    words = Ids(*(ids[:QUICK_PAIRS] for ids in words)) if quick else words
    model = load_pretrained(model_folder())
    glosses, names = (embed(model, ids) for ids in words)
    return glosses, scores_of(glosses, names).recall_1


def _measures(
    model: Retriever, test: Ids, words: Ids, before: tuple[Tensor, float], scale: float = 1.0
) -> dict[str, float]:
    base, recall_1 = before
    with nullcontext() if scale == 1.0 else merged(model, scale):
        found, glosses, names = scores(model, test), embed(model, words.queries), embed(model, words.documents)
    kept = scores_of(glosses, names)
    drift = (glosses - base).square().sum(1).mean() / (base - base.mean(0)).square().sum(1).mean()
    return {
        "target": round(100 * found.recall_1, 4),
        "target_10": round(100 * found.recall_10, 4),
        "mrr": round(found.mrr, 5),
        "nll": round(found.nll, 5),
        "lost": round(100 * (recall_1 - kept.recall_1), 4),
        "drift": float(f"{drift.item():.5g}"),
    }
