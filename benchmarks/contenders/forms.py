"""Which forms slora takes for a call, where its kernels are to choose from, and how to pin one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

from benchmarks.results import Missing
from benchmarks.timing import captured
from slora.ops.backends import autotune, triton

NAMES = ("fused", "split", "precomputed", "cublas_after", "cublas_before")


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

    with _chosen_by(noted):
        yield taken


class Pin:
    """Computes y and dx in the form `name`, by its fastest tile sizes on a GPU, by its first ones elsewhere.

    The weight gradients stay what they are.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        # By what a choice depends on: a call should not cost more of the host than an unpinned one.
        self.found: dict[tuple[Any, ...], triton.Form] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Pin the calls inside.

        Raises:
            Missing: inside, where an operation has no such candidate.
        """
        choose = triton._form
        with _chosen_by(lambda operation: self.form(operation) or choose(operation)):
            yield

    def form(self, operation: triton.Operation) -> triton.Form | None:
        """The form of this name for y or dx, None for the weight gradients."""
        shape, M = operation.key, operation.rows.shape[0]
        if shape[0] == "weight gradients":
            return None
        if (shape, M) not in self.found:
            forms = {str(form): form for form in operation.forms() if form.name == self.name}
            if not forms:
                raise Missing(f"the {shape[0]} has no form {self.name!r} here")
            fastest: str | None = next(iter(forms))
            if operation.rows.is_cuda:
                calls = {text: partial(operation.compute, form) for text, form in forms.items()}
                fastest = autotune.choose(f"{triton._words(shape)} {self.name}", M, operation.rows.device, calls)
            if fastest is None:
                return next(iter(forms.values()))
            self.found[shape, M] = forms[fastest]
        return self.found[shape, M]


@contextmanager
def _chosen_by(choose: Callable[[triton.Operation], triton.Form]) -> Iterator[None]:
    before = triton._form
    triton._form = choose  # type: ignore[assignment]
    try:
        yield
    finally:
        triton._form = before
