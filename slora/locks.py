"""One lock for what changes the weights that a model computes with, or must not see them half changed."""

from __future__ import annotations

import threading

changing = threading.RLock()
"""Held by inject, unload, merge, unmerge, loading and saving. One for all models, since the same layers may be reached
through a model, its wrapper and a part of it; what holds it takes milliseconds. By the same thread it can be taken
again."""
