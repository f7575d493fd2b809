"""CLIP: models with an image and a text tower, as open_clip builds them.

clip.py        `Clip`: both towers, their tokenizer and the images they take
classifier.py  `ClipClassifier`: the image tower with a linear head
"""

from slora.clip.classifier import ClipClassifier
from slora.clip.clip import Clip

__all__ = ["Clip", "ClipClassifier"]
