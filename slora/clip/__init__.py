"""CLIP: models with an image and a text tower, as open_clip builds them.

clip.py        `Clip`: both towers, their tokenizer and the images they take
prompts.py     names of classes and templates, from open_clip or from files
prompted.py    `PromptedClip`: zero-shot logits and the contrastive loss with prompts of the classes
towers.py      which layers belong to a tower
classifier.py  `ClipClassifier`: the image tower with a linear head
"""

from slora.clip.classifier import ClipClassifier
from slora.clip.clip import Clip
from slora.clip.prompted import PromptedClip
from slora.clip.prompts import Prompts

__all__ = ["Clip", "ClipClassifier", "PromptedClip", "Prompts"]
