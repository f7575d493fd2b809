"""Evaluation: accuracy on the new data, and how well features still separate the classes of other data.

accuracy.py   accuracy and loss of a classifier
knn.py        weighted k-NN on features, which needs no head
"""

from slora.evaluation.accuracy import Accuracy, accuracy
from slora.evaluation.knn import features, knn_accuracy

__all__ = ["Accuracy", "accuracy", "features", "knn_accuracy"]
