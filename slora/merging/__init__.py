"""Folding blocks into base weights.

merge.py     `merge`, `unmerge`, `merge_and_unload` of a model
merged.py    `merged`: a model that is merged inside a context
overflow.py  the check that no merged weight overflows
batched.py   `batched_merge_`, `batched_merge`: all weights of a device in one call, in C++ or CUDA (`csrc/`)
fallback.py  the same in PyTorch
terms.py     the arguments of a batched merge, checked
"""

from slora.merging.batched import batched_merge, batched_merge_, extension_info
from slora.merging.merge import merge, merge_and_unload, unmerge
from slora.merging.merged import merged

__all__ = ["batched_merge", "batched_merge_", "extension_info", "merge", "merge_and_unload", "merged", "unmerge"]
