"""Fixtures of the tests of layers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Start and end without compiled graphs."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
