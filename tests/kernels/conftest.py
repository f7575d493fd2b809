"""Where the kernels' tests run: on the GPU if there is one, else in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import os

import pytest
import torch

# Triton decides when a kernel is defined, so this has to stand before any import of slora.kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    """The device that the kernels run on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
