"""The batched merge in plain PyTorch, where the extension is missing or does not support the tensors."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from slora.merging.terms import Term

# Elements of the wide copy that one step works on: the scratch memory is a few times this.
_CHUNK = 1 << 20


@torch.no_grad()
def merge_(weights: Sequence[Tensor], terms: Sequence[Term], copies: Sequence[Tensor] | None = None) -> None:
    """Add all terms to `weights` in place, after `slora.merging.terms.check` has passed.

    The rows that change are backed up until the last one is written, and restored after an exception; from `copies` of
    the weights where the caller has them.
    """
    work = _by_rows(weights, terms)
    backups = [copies[i][first:last] if copies else weights[i][first:last].clone() for i, first, last, _ in work]
    done = 0
    try:
        with _full_precision(weights):
            for i, first, last, covering in work:
                done += 1
                _add(weights[i][first:last], weights[i][first:last], first, covering)
    except BaseException:
        for (i, first, last, _), before in zip(work[:done], backups, strict=False):
            weights[i][first:last].copy_(before)
        raise


@torch.no_grad()
def merge(weights: Sequence[Tensor], terms: Sequence[Term]) -> list[Tensor]:
    """Return new weights with all terms added."""
    results = [W.clone(memory_format=torch.contiguous_format) for W in weights]
    with _full_precision(weights):
        for i, first, last, covering in _by_rows(weights, terms):
            _add(weights[i][first:last], results[i][first:last], first, covering)
    return results


def _by_rows(weights: Sequence[Tensor], terms: Sequence[Term]) -> list[tuple[int, int, int, list[Term]]]:
    """Return (weight, first row, end, terms) for every run of rows to which the same terms apply."""
    work = []
    of_weight: dict[int, list[Term]] = {}
    for term in terms:
        if term.scale != 0 and term.B.numel() and weights[term.weight].numel():
            of_weight.setdefault(term.weight, []).append(term)
    for i, mine in of_weight.items():
        cuts = sorted({row for t in mine for row in (t.first_row, t.first_row + t.B.shape[0])})
        for first, last in itertools.pairwise(cuts):
            covering = [t for t in mine if t.first_row <= first < t.first_row + t.B.shape[0]]
            if covering:
                work.append((i, first, last, covering))
    return work


def _add(source: Tensor, target: Tensor, first: int, terms: Sequence[Term]) -> None:
    wide = torch.float64 if source.dtype == torch.float64 else torch.float32
    step = max(1, _CHUNK // source.shape[1])
    As = [t.A.to(wide) for t in terms]
    for row in range(0, source.shape[0], step):
        rows = slice(row, min(row + step, source.shape[0]))
        delta = torch.zeros(source[rows].shape, dtype=wide, device=source.device)
        for t, A in zip(terms, As, strict=True):
            offset = first - t.first_row
            delta.addmm_(t.B[rows.start + offset : rows.stop + offset].to(wide) * t.scale, A)
        target[rows].copy_(delta.add_(source[rows]))


@contextlib.contextmanager
def _full_precision(weights: Sequence[Tensor]) -> Iterator[None]:
    """Keep TF32, bf16 and autocast out of the products."""
    # Not torch.get_float32_matmul_precision, which raises once anyone has set one of these.
    products: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [product.fp32_precision for product in products]
    try:
        for product in products:
            product.fp32_precision = "ieee"
        with contextlib.ExitStack() as stack:
            for device in {W.device.type for W in weights}:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        for product, precision in zip(products, before, strict=True):
            product.fp32_precision = precision
