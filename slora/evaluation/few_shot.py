"""Few-shot evaluation: a linear classifier on frozen features of k images per class."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from slora.errors import ConfigError, DataError
from slora.evaluation.labels import require_labels
from slora.io.bounded import is_count
from slora.io.plain import plain


def few_shot_indices(
    labels: Sequence[int] | Tensor, shots: int, seed: int = 0, names: Sequence[str] | None = None
) -> list[int]:
    """Return the rows of `shots` images of each class, drawn at random.

    The draw depends on the labels and the seed alone, and is nested: with fewer shots, a subset of the same rows.

    Args:
        names: of the classes, for the error.

    Raises:
        ConfigError: shots is not an integer from 1, or a class has fewer images.
        DataError: labels are not integers from 0.
    """
    if not is_count(plain(shots)) or shots < 1:
        raise ConfigError(f"shots={shots} is not a number of images per class; use 1 or more")
    members: dict[int, list[int]] = {}
    labels = torch.as_tensor(labels)
    require_labels(labels, len(labels))
    for row, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(row)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in sorted(members):
        rows = members[label]
        if len(rows) < shots:
            name = label if names is None else repr(names[label])
            raise ConfigError(f"shots={shots} exceeds the {len(rows)} images of class {name}; use {len(rows)} or less")
        chosen += [rows[i] for i in torch.randperm(len(rows), generator=generator)[:shots].tolist()]
    return sorted(chosen)


def linear_probe_accuracy(
    features: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, C: float = 0.316
) -> float:
    """Return the top-1 accuracy of a logistic regression on the features, by scikit-learn's L-BFGS.

    The linear probe of CLIP (arXiv 2103.00020, appendix A.3). C is that of the official repository's example; the paper
    chooses it on validation images, which few shots do not have.

    Args:
        features: of the images to learn from, `[n, d]`.
        labels: their classes, `[n]`.
        queries: of the images to classify, `[q, d]`.
        query_labels: their classes, `[q]`.
        C: weight of the loss relative to the L2 penalty, positive.

    Raises:
        ConfigError: C is not positive.
        DataError: shapes disagree, a feature is not finite, labels are not integers from 0, there are fewer than two
            classes, or no query.
    """
    from sklearn.linear_model import LogisticRegression

    if not 0 < C < math.inf:
        raise ConfigError(f"C={C} is not positive and finite; the example of CLIP uses 0.316")
    if features.dim() != 2 or queries.dim() != 2 or features.shape[1] != queries.shape[1]:
        raise DataError(
            f"features of shapes {list(features.shape)} and {list(queries.shape)}; expected [n, d] and [q, d]"
        )
    require_labels(labels, len(features))
    require_labels(query_labels, len(queries))
    if not bool(torch.isfinite(features).all() and torch.isfinite(queries).all()):
        raise DataError("a feature is NaN or infinite; the model was damaged, or an image is not finite")
    if len(labels.unique()) < 2 or not len(queries):
        raise DataError(
            f"{len(labels.unique())} classes to learn and {len(queries)} images to classify; a linear probe needs at "
            f"least two classes and one image"
        )
    probe = LogisticRegression(C=C, max_iter=1000)
    with warnings.catch_warnings():
        # It takes labels of which most are different, as those of one shot, for values of a regression.
        warnings.filterwarnings("ignore", message="The number of unique classes is greater than 50%")
        probe.fit(features.float().cpu().numpy(), labels.cpu().numpy())
    predicted = probe.predict(queries.float().cpu().numpy())
    return float((torch.as_tensor(predicted) == query_labels.cpu()).float().mean())
