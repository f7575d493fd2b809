"""Few shots: which images are drawn, and a linear probe on their features."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from slora import ConfigError, DataError
from slora.evaluation import few_shot_indices, linear_probe_accuracy

pytestmark = pytest.mark.once

LABELS = [0, 1, 2] * 20


def test_each_class_gets_its_shots_and_fewer_shots_are_a_subset() -> None:
    drawn = {shots: few_shot_indices(LABELS, shots, seed=3) for shots in (1, 2, 4, 8, 16)}
    for shots, rows in drawn.items():
        assert sorted(LABELS[row] for row in rows) == [0] * shots + [1] * shots + [2] * shots
        assert rows == sorted(set(rows))
    assert set(drawn[1]) < set(drawn[2]) < set(drawn[16])
    assert drawn[4] == few_shot_indices(torch.tensor(LABELS), 4, seed=3)
    assert drawn[4] != few_shot_indices(LABELS, 4, seed=4)


def test_more_shots_than_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="shots=3 exceeds the 2 images of class 1; use 2 or less"):
        few_shot_indices([0, 0, 0, 1, 1], 3)
    for shots in (0, 1.5, True):
        with pytest.raises(ConfigError, match=f"shots={shots} is not a number of images"):
            few_shot_indices(LABELS, shots)
    with pytest.raises(DataError, match=r"labels are torch\.float32"):
        few_shot_indices([0.5, 1.0], 1)


def test_the_linear_probe_minimises_the_penalised_cross_entropy() -> None:
    """Gradient descent on C * sum of losses + |W|^2 / 2, the bias free, finds the same predictions."""
    labels = torch.arange(60) % 3
    centres = torch.randn(3, 4, dtype=torch.float64)
    features = centres[labels] + torch.randn(60, 4, dtype=torch.float64)
    queries, expected = torch.randn(200, 4, dtype=torch.float64), torch.arange(200) % 3
    weight, bias = (torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (3,)))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = 0.316 * F.cross_entropy(features @ weight.T + bias, labels, reduction="sum") + (weight**2).sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    right = (queries @ weight.T + bias).argmax(1) == expected
    # scikit-learn stops at a gradient of 1e-4, so an image on the border may fall on its other side.
    assert linear_probe_accuracy(features, labels, queries, expected) == pytest.approx(
        float(right.double().mean()), abs=1 / 200
    )


def test_one_shot_is_no_regression(recwarn: pytest.WarningsRecorder) -> None:
    points = torch.eye(4)
    assert linear_probe_accuracy(points, torch.arange(4), points * 2, torch.arange(4)) == 1.0
    assert not recwarn.list


def test_one_class_is_nothing_to_learn() -> None:
    features = torch.randn(3, 2)
    with pytest.raises(DataError, match="1 classes to learn and 3 images"):
        linear_probe_accuracy(features, torch.zeros(3).long(), features, torch.zeros(3).long())


def test_a_probe_of_bad_input_is_refused_by_value() -> None:
    points, labels = torch.eye(4), torch.arange(4)
    with pytest.raises(DataError, match="NaN or infinite"):
        linear_probe_accuracy(points / 0.0, labels, points, labels)
    with pytest.raises(DataError, match=r"shapes \[4, 4\] and \[4, 3\]"):
        linear_probe_accuracy(points, labels, points[:, 1:], labels)
    with pytest.raises(DataError, match=r"labels are torch.int64 \[3\], expected integers \[4\]"):
        linear_probe_accuracy(points, labels[1:], points, labels)
    for C in (0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=f"C={C} is not positive"):
            linear_probe_accuracy(points, labels, points, labels, C)
