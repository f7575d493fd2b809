"""Which forms slora takes for a call, where its kernels are to choose from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from benchmarks.timing import captured
from slora.ops.backends import triton


def taken_by(call: Callable[[], Any], device: str) -> str | None:
    """The forms of the forward and of dx, as `counting.bytes_moved` takes them; None where there was no choice.

    On a GPU those in a CUDA graph, which is what is timed: there only the device knows the active blocks.
    """
    with observed() as taken:
        call()
        if taken and device != "cpu":
            # What cannot be captured is timed as it is launched.
            with suppress(Exception):
                captured([call])
            torch.cuda.synchronize()
    names = dict.fromkeys(taken[part] for part in ("forward", "input gradient") if part in taken)
    return "/".join(names) or None


@contextmanager
def observed() -> Iterator[dict[str, str]]:
    """Yield a dictionary that has, by operation of the Triton backend, the form in which it was last computed."""
    taken: dict[str, str] = {}
    choose = triton._form

    def noted(operation: triton.Operation) -> triton.Form:
        form = choose(operation)
        taken[operation.key[0]] = form.name
        return form

    triton._form = noted
    try:
        yield taken
    finally:
        triton._form = choose
