"""Folding blocks into base weights: `merge.py` for a model in use, `merge_and_unload` to leave slora behind."""

from slora.merging.merge import merge, merge_and_unload, unmerge

__all__ = ["merge", "merge_and_unload", "unmerge"]
