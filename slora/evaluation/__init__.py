"""Evaluation: what a fine-tuned model can do, and what it still knows of the data it was pretrained on.

accuracy.py   share of images named rightly
knn.py        weighted k-NN on features, in need of no head: what the features still tell apart
"""

from slora.evaluation.accuracy import Accuracy, accuracy
from slora.evaluation.knn import features, knn_accuracy

__all__ = ["Accuracy", "accuracy", "features", "knn_accuracy"]
