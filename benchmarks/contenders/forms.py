"""Which forms slora takes for a call, where its kernels are to choose from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from benchmarks.timing import captured
from slora import forms


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
    """Yield a dictionary that has, by operation of `slora.forms`, the form by which it was last computed inside."""
    taken: dict[str, str] = {}
    run = forms._run

    def noted(
        shape: forms.Shape, rows: torch.Tensor, candidates: Callable[[], list[forms.Form]],
        compute: Callable[[forms.Form], Any],
    ) -> Any:  # fmt: skip
        def one(form: forms.Form) -> Any:
            taken[shape.operation] = form.name
            return compute(form)

        return run(shape, rows, candidates, one)

    forms._run = noted
    try:
        yield taken
    finally:
        forms._run = run
