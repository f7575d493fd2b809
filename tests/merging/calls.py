"""Backends, dtypes and a small weight with its factors, for calls of a batched merge."""

from __future__ import annotations

import pytest
import torch

from slora.merging import extension_info

needs_extension = pytest.mark.skipif(not extension_info()["available"], reason="slora._C is not built")
BACKENDS = [pytest.param("auto", marks=needs_extension), "torch"]
NARROW = [torch.float32, torch.bfloat16, torch.float16]

W0, A0, B0 = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
