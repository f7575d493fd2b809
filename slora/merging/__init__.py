"""Folding blocks into base weights: `merge.py` for a model in use, `merge_and_unload` to leave slora behind.

`batched_merge_` and `batched_merge` do it for any list of weights.
"""

from slora.merging.batched import batched_merge, batched_merge_, extension_info
from slora.merging.merge import merge, merge_and_unload, unmerge

__all__ = ["batched_merge", "batched_merge_", "extension_info", "merge", "merge_and_unload", "unmerge"]
