"""Both tasks as token ids, the contrastive loss, and how well documents are found."""

from __future__ import annotations

import hashlib
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from examples.minilm.encoder import QUERY, SCALE, Retriever, embed, model_folder, tokenize
from examples.minilm.functions import LIBRARIES, Pair, Split, function_pairs, roots
from examples.minilm.words import word_pairs, wordnet_folder
from slora.evaluation import recall_at_k
from slora.io.atomic import write_atomically

# Tokens of a query and of a document.
LENGTHS = (QUERY, 32)
# Pairs of each set. The texts for distillation are not among the words that are tested.
COUNTS: dict[Split, int] = {"training": 960, "validation": 500, "test": 500}
WORDS, RETAINED = 500, 64

_FORMAT = 3


class Ids(NamedTuple):
    """Pairs as token ids `[n, length]`, padded with 0."""

    queries: Tensor
    documents: Tensor

    def together(self) -> Tensor:
        """Return `[n, length of both]`, as the model takes them in training."""
        return torch.cat([self.queries, self.documents], 1)


class Scores(NamedTuple):
    """How well queries find their documents among all of a set: shares from 0 to 1, and the loss of the set in nats."""

    recall_1: float
    recall_10: float
    mrr: float
    nll: float


def info_nce(similarities: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the symmetric InfoNCE loss of n pairs, with the other pairs as negatives (CLIP, arXiv 2103.00020).

    Args:
        similarities: scaled, of n queries and n documents, `[n, n]`.
        labels: not used; a criterion of `slora.training.train` is called with those of the data.
    """
    own = torch.arange(len(similarities), device=similarities.device)
    return 0.5 * (cross_entropy(similarities, own) + cross_entropy(similarities.T, own))


def scores(model: Retriever, pairs: Ids, at: tuple[int, int] = (1, 10)) -> Scores:
    """Return how well the model finds the documents of `pairs`, with recall at other ranks than 1 and 10 if asked."""
    queries, documents = (embed(model, ids) for ids in pairs)
    return scores_of(queries, documents, at)


def scores_of(queries: Tensor, documents: Tensor, at: tuple[int, int] = (1, 10)) -> Scores:
    """Return the same for embeddings `[n, d]` of both."""
    similarity = queries @ documents.T
    # Equally similar documents count as found before, as in `recall_at_k`.
    ranks = (similarity >= similarity.diagonal()[:, None]).sum(1)
    found = recall_at_k(documents, queries, torch.arange(len(queries)), k=at).text_to_image
    return Scores(found[at[0]], found[at[1]], float((1 / ranks).mean()), float(info_nce(SCALE * similarity)))


def tasks() -> dict[str, Ids]:
    """Return "training", "validation" and "test" of the new task, "words" of the old one, and "retained" texts of it.

    Built once, which takes a quarter of a minute, and then read from `SLORA_CACHE` (default `~/.cache/slora`).

    Raises:
        MissingDependencyError: the model's package, WordNet or a library is missing; says how to get it.
    """
    model, wordnet, folders = model_folder(), wordnet_folder(), roots()
    packages = ["scikit-learn" if name == "sklearn" else name for name in LIBRARIES]
    versions = [sys.version, *map(version, packages)]
    key = hashlib.sha256(repr((_FORMAT, versions, LENGTHS, COUNTS, WORDS, RETAINED)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("SLORA_CACHE") or Path.home() / ".cache" / "slora") / f"minilm-{key}.safetensors"
    if not cache.is_file():
        pairs: dict[str, list[Pair]] = dict(function_pairs(folders, COUNTS).items())
        pairs["words"] = word_pairs(wordnet, WORDS)
        pairs["retained"] = word_pairs(wordnet, RETAINED, skip=WORDS)
        held = {
            f"{name}.{field}": tokenize([getattr(pair, field) for pair in found], model, length)
            for name, found in pairs.items()
            for field, length in zip(Pair._fields, LENGTHS, strict=True)
        }
        write_atomically(cache, lambda path: save_file(held, path))
    tensors = load_file(cache)
    names = dict.fromkeys(key.split(".")[0] for key in tensors)
    return {name: Ids(tensors[f"{name}.query"], tensors[f"{name}.document"]) for name in names}
