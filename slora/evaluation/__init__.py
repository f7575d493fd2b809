"""Evaluation: accuracy and calibration on the new data, and what a model still knows of other data.

accuracy.py    accuracy, NLL and calibration error of a classifier
knn.py         weighted k-NN on features, which needs no head
few_shot.py    linear classifier on the features of a few images per class
grouped.py     classifiers of groups of a model's outputs; labels.py: labels checked
retrieval.py   image-text retrieval: recall@k of a CLIP; similarity.py: similarities in bounded memory
"""

from slora.evaluation.accuracy import Accuracy, accuracy
from slora.evaluation.few_shot import few_shot_indices, linear_probe_accuracy
from slora.evaluation.grouped import GroupedLogits
from slora.evaluation.knn import features, knn_accuracy
from slora.evaluation.retrieval import Recall, image_embeddings, recall_at_k, text_embeddings

__all__ = [
    "Accuracy",
    "GroupedLogits",
    "Recall",
    "accuracy",
    "features",
    "few_shot_indices",
    "image_embeddings",
    "knn_accuracy",
    "linear_probe_accuracy",
    "recall_at_k",
    "text_embeddings",
]
