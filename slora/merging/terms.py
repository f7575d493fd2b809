"""The arguments of a batched merge: terms grouped by weight, and all checks, before anything is written."""

from __future__ import annotations

import bisect
import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slora.errors import ConfigError, ShapeError, StateError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Term(NamedTuple):
    """`scale * B @ A`, added to the rows `first_row, ..., first_row + len(B) - 1` of `weights[weight]`."""

    weight: int
    A: Tensor
    B: Tensor
    scale: float
    first_row: int


def grouped(
    weights: Sequence[Tensor],
    lora_As: Sequence[Any],
    lora_Bs: Sequence[Any],
    scales: Sequence[Any],
    rows: Sequence[Any] | None,
    names: Sequence[str] | None,
) -> list[Term]:
    """Return the terms in order; an entry per weight is one value, or a sequence with one value per term.

    Raises:
        ShapeError: an argument is no list, or the lists differ in length.
        ConfigError: a scale is not a real number, or a row not an integer.
    """
    lists: dict[str, Any] = {
        "weights": weights,
        "lora_As": lora_As,
        "lora_Bs": lora_Bs,
        "scales": scales,
        "rows": rows,
        "names": names,
    }
    for name, entries in lists.items():
        if entries is None and name in ("rows", "names"):
            continue
        if isinstance(entries, str) or not hasattr(entries, "__getitem__") or getattr(entries, "ndim", 1) == 0:
            raise ShapeError(f"{name} is {_described(entries)}; give a list with one entry per weight")
        if len(entries) != len(weights):
            raise ShapeError(f"{name} has {len(entries)} entries for {len(weights)} weights; give each weight one")
    terms: list[Term] = []
    for i in range(len(weights)):
        As, Bs = _several(lora_As[i]), _several(lora_Bs[i])
        factors = _several(scales[i]) if isinstance(scales[i], Sequence) else [scales[i]] * len(As)
        first = [0] * len(As) if rows is None else _several(rows[i])
        if not len(As) == len(Bs) == len(factors) == len(first):
            raise ShapeError(
                f"{_item('weights', i, names)} has {len(As)} lora_As, {len(Bs)} lora_Bs, {len(factors)} scales and "
                f"{len(first)} rows; each term needs one of each"
            )
        for A, B, c, row in zip(As, Bs, factors, first, strict=True):
            scale, start = real(c), _integer(row)
            if scale is None:
                raise ConfigError(
                    f"the scale of term {len(terms)}, of {_item('weights', i, names)}, is {_quoted(c)}; use a number, "
                    f"such as scale.item() of a tensor, or a list with one number per term"
                )
            if start is None:
                raise ConfigError(
                    f"the first row of term {len(terms)}, of {_item('weights', i, names)}, is {_quoted(row)}; "
                    f"use an integer"
                )
            terms.append(Term(i, A, B, scale, start))
    return terms


def real(value: Any) -> float | None:
    """Return a number, or a tensor of one element that requires no gradient, as a float; None for anything else."""
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        followed = value.requires_grad or value.is_complex() or value.dtype == torch.bool
        return None if followed or value.numel() != 1 or value.device.type == "meta" else float(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _integer(value: Any) -> int | None:
    if type(value) is int:
        return value
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def is_plain(tensor: Any) -> bool:
    """Whether `tensor` is a strided Tensor or Parameter, of no subclass, without a pending negation."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_neg()


def check(
    weights: Sequence[Tensor], terms: Sequence[Term], names: Sequence[str] | None, *, in_place: bool, whole: bool
) -> None:
    """Check that a merge can be done in full; with `whole`, also that every term covers all rows.

    Raises:
        ShapeError: sizes, dtypes or devices disagree, or tensors share memory that is written.
        StateError: a weight is an inference tensor, or requires grad while autograd records.
        ConfigError: a scale is not finite.
    """
    for i, W in enumerate(weights):
        name = _item("weights", i, names)
        if not isinstance(W, Tensor) or W.dim() != 2:
            raise ShapeError(f"{name} is {_described(W)}; expected a tensor [N, K]")
        _check_dtype(W, name)
        if i == 0 and W.device.type == "meta":
            raise ShapeError(f"{name} is on meta, where weights have no values; materialise the model first")
        if W.device != weights[0].device:
            raise ShapeError(
                f"{name} is on {W.device}, but {_item('weights', 0, names)} on {weights[0].device}; "
                f"merge the weights of each device in a call of its own"
            )
        if in_place and W.is_inference():
            raise StateError(f"{name} is an inference tensor; clone it outside torch.inference_mode()")
        if in_place and W.requires_grad and torch.is_grad_enabled():
            raise StateError(f"{name} requires grad while autograd records; merge under torch.no_grad()")
        if in_place and _overlaps_itself(W):
            raise ShapeError(f"{name} has strides {W.stride()}, so its elements share memory; clone it first")
    for i, term in enumerate(terms):
        _check_term(weights[term.weight], term, i, names, whole)
    if in_place:
        _check_overlaps(weights, terms, names)


def _check_term(W: Tensor, term: Term, index: int, names: Sequence[str] | None, whole: bool) -> None:
    _, A, B, scale, first = term
    weight = _item("weights", term.weight, names)
    for name, matrix in ((f"lora_A of {weight}", A), (f"lora_B of {weight}", B)):
        if not isinstance(matrix, Tensor) or matrix.dim() != 2:
            raise ShapeError(f"the {name} (term {index}) is {_described(matrix)}; expected a matrix")
        _check_dtype(matrix, f"the {name} (term {index})")
        if matrix.device != W.device:
            raise ShapeError(f"the {name} (term {index}) is on {matrix.device}, its weight on {W.device}; move one")
    N, K = W.shape
    if A.shape[1] != K or A.shape[0] != B.shape[1]:
        raise ShapeError(
            f"{weight} has shape {[N, K]}, but lora_A of term {index} {list(A.shape)} and its lora_B {list(B.shape)}; "
            f"expected [r, {K}] and [rows, r]"
        )
    if first < 0 or first + B.shape[0] > N:
        raise ShapeError(
            f"term {index} covers the rows {first} to {first + B.shape[0]} of {weight}, which has {N}; "
            f"give its first row in rows="
        )
    if whole and B.shape[0] != N:
        raise ShapeError(
            f"lora_B of term {index} has {B.shape[0]} rows, {weight} {N}; where a term covers a part of the rows, "
            f"give the first of them in rows="
        )
    largest = torch.finfo(torch.float64 if W.dtype == torch.float64 else torch.float32).max
    if not math.isfinite(scale) or abs(scale) > largest:
        raise ConfigError(f"the scale of term {index}, of {weight}, is {scale}; use a finite number")


def _check_dtype(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        raise ShapeError(
            f"{name} is {tensor.dtype}, {tensor.layout}; merging takes strided float32, bfloat16, float16 and "
            f"float64: dequantise or convert it first"
        )


class Span(NamedTuple):
    """The bytes `begin, ..., end - 1`, in which a tensor lies, and its name: runs of `width` bytes, `stride` apart."""

    begin: int
    end: int
    stride: int
    """0 for a single run, and for tensors that are no matrices."""
    width: int
    name: str


def span(tensor: Tensor, name: str) -> Span:
    """Where the elements of `tensor` lie; it has at least one."""
    size, begin = tensor.element_size(), tensor.data_ptr()
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = begin + (reach + 1) * size
    if tensor.dim() != 2:
        return Span(begin, end, 0, end - begin, name)
    # The runs go along the smaller stride; that of a single row or column says nothing.
    (rows, cols), (down, right) = tensor.shape, tensor.stride()
    along_rows = right == 1 if rows == 1 else down != 1 if cols == 1 else right <= down
    apart, count, run = (down, rows, (cols - 1) * right) if along_rows else (right, cols, (rows - 1) * down)
    return Span(begin, end, apart * size if count > 1 else 0, (run + 1) * size, name)


def disjoint(a: Span, b: Span) -> bool:
    """Whether no byte belongs to both: they lie apart, or are windows of one stride that do not meet."""
    if a.end <= b.begin or b.end <= a.begin:
        return True
    stride = max(a.stride, b.stride)
    if not stride or (a.stride != b.stride and a.stride and b.stride):
        return False
    offset = (b.begin - a.begin) % stride
    return offset >= a.width and offset + b.width <= stride


def _check_overlaps(weights: Sequence[Tensor], terms: Sequence[Term], names: Sequence[str] | None) -> None:
    written = sorted(span(W, _item("weights", i, names)) for i, W in enumerate(weights) if _has_memory(W))
    reach: list[int] = []
    for i, one in enumerate(written):
        for other in written[i + 1 :]:
            if other.begin >= one.end:
                break
            if not disjoint(one, other):
                raise _shared(one.name, other.name)
        reach.append(max(one.end, reach[-1] if reach else 0))
    begins = [one.begin for one in written]
    for index, term in enumerate(terms):
        for matrix, letter in ((term.A, "A"), (term.B, "B")):
            if not _has_memory(matrix):
                continue
            read = span(matrix, f"lora_{letter} of {_item('weights', term.weight, names)} (term {index})")
            i = bisect.bisect_left(begins, read.end)
            while i and reach[i - 1] > read.begin:
                i -= 1
                if not disjoint(written[i], read):
                    raise _shared(written[i].name, read.name)


def _shared(first: str, second: str) -> ShapeError:
    return ShapeError(
        f"{first} and {second} share memory; pass each weight once, with all its terms in its entry of lora_As, "
        f"lora_Bs and scales, and clone what is tied"
    )


def _has_memory(tensor: Tensor) -> bool:
    """Whether there are bytes that others could share; a subclass may wrap other tensors and have none of its own."""
    if not tensor.numel():
        return False
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:
        return False


def _overlaps_itself(W: Tensor) -> bool:
    reach = 0
    for stride, n in sorted((stride, n) for n, stride in zip(W.shape, W.stride(), strict=True) if n > 1):
        if stride <= reach:
            return W.numel() > 0
        reach += stride * (n - 1)
    return False


def _several(entry: Any) -> list[Any]:
    # A tensor is no Sequence, but it takes Python long to find that out.
    return list(entry) if type(entry) is not Tensor and isinstance(entry, Sequence) else [entry]


def _item(argument: str, index: int, names: Sequence[str] | None) -> str:
    return f"{argument}[{index}]" if names is None else f"{argument}[{index}] ({names[index]!r})"


def _quoted(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_described(value)}{' that requires grad' if value.requires_grad else ''}"
    return repr(value)


def _described(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"
