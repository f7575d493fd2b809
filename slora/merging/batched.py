"""`batched_merge_` and `batched_merge`: the low-rank updates of many weights in one call.

For every weight `W [N, K]` and the terms `(A_t [r_t, K], B_t [n_t, r_t], c_t)` that cover row n,

    delta[n, k] = sum over the terms t in the order given, and over j = 0, ..., r_t - 1, of  (c_t B_t[n, j]) A_t[j, k]
    W[n, k]     = round(W[n, k] + delta[n, k])

in fp32 (fp64 for fp64 weights). The extension `slora._C` does so in one parallel region on the CPU and in one launch
per dtype on a GPU, reads and writes each weight once and holds no dense delta. Its CPU path fixes the bits: `c_t B_t`
is rounded to fp32, each product is added to `delta` by a fused multiply-add, in the order above, then `W + delta` is
rounded to fp32 and that to the dtype of the weight, each time to nearest even. So a bf16 or fp16 weight gets exactly
what rounding the result of the same call on `W.float()` gives.

Error: with R the total rank of a row and P = sum |c_t B_t[n, j] A_t[j, k]|, the R roundings of the running sum, one
of each `c_t B_t` and one of the last addition are at most u = 2**-24 of what they round, so
`|fp32 result - exact| <= u (|W| + (R + 2) P)` to first order: one unit in the last place of `|W| + (R + 2) P`.

Without the extension PyTorch computes the same in fp32 with an order of summation of its own, within the same bound.
"""

from __future__ import annotations

import functools
import importlib
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slora.backends import backend
from slora.merging import fallback
from slora.merging.terms import Term, check, grouped

Matrices = Tensor | Sequence[Tensor]
Scales = float | Sequence[float]
Rows = int | Sequence[int]


def batched_merge_(
    weights: Sequence[Tensor],
    lora_As: Sequence[Matrices],
    lora_Bs: Sequence[Matrices],
    scales: Sequence[Scales],
    *,
    rows: Sequence[Rows] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Add `scale * B @ A` to every weight, in place, all of them in one call.

    The simple call gives each weight one term: `batched_merge_([W], [A], [B], [0.5])`. A weight with several terms
    has sequences in its place, and `rows` names the first row of a term that covers a part of the rows (a block of
    a fused qkv): `batched_merge_([W], [[A0, A2]], [[B0, B2]], [[c, c]], rows=[[0, 2 * n]])`. A single scale serves
    all terms of its weight. Row slices and column windows of one tensor may be passed as weights of their own as
    long as they do not meet.

    Every check precedes the first write, and an exception leaves all weights as they were. Nothing is recorded for
    autograd. A term whose scale is 0 or whose rank is 0 leaves the bits of its rows alone.

    Args:
        weights: `[N, K]` each, fp32, bf16, fp16 or fp64, with any strides, all on one device.
        lora_As: per weight, `[r, K]` or a sequence of such; any rank, any of the four dtypes, any strides.
        lora_Bs: per weight, `[N, r]`, or `[n, r]` with `rows`.
        scales: per weight, a finite number or one per term.
        rows: per weight, the first row that its term changes, or one per term; default all rows.
        names: what errors call the weights, such as the names of their modules.

    Raises:
        ShapeError: sizes, dtypes or devices disagree, weights share memory with each other or with a matrix.
        StateError: a weight is an inference tensor, or requires grad while autograd records.
        ConfigError: a scale is not finite.
    """
    terms = grouped(weights, lora_As, lora_Bs, scales, rows, names)
    check(weights, terms, names, in_place=True, whole=rows is None)
    with torch.no_grad():
        if not weights:
            return
        if not _use_extension(weights, terms):
            fallback.merge_(weights, terms)
            return
        # The extension wants adjacent columns; other layouts go through a copy, made before anything is written.
        adjacent = [W if W.shape[1] <= 1 or W.stride(1) == 1 else W.contiguous() for W in weights]
        torch.ops.slora.batched_merge_(adjacent, *_flat(terms))
        for W, merged in zip(weights, adjacent, strict=True):
            if merged is not W:
                W.copy_(merged)


def batched_merge(
    weights: Sequence[Tensor],
    lora_As: Sequence[Matrices],
    lora_Bs: Sequence[Matrices],
    scales: Sequence[Scales],
    *,
    rows: Sequence[Rows] | None = None,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """Return new, contiguous weights with the updates added; the arguments are those of `batched_merge_`.

    Nothing is written but the results, so weights may share memory here, or be inference tensors.

    Raises:
        ShapeError: sizes, dtypes or devices disagree.
        ConfigError: a scale is not finite.
    """
    terms = grouped(weights, lora_As, lora_Bs, scales, rows, names)
    check(weights, terms, names, in_place=False, whole=rows is None)
    with torch.no_grad():
        if not weights:
            return []
        if not _use_extension(weights, terms):
            return fallback.merge(weights, terms)
        adjacent = [W if W.shape[1] <= 1 or W.stride(1) == 1 else W.contiguous() for W in weights]
        results: list[Tensor] = torch.ops.slora.batched_merge(adjacent, *_flat(terms))
        return results


def extension_info() -> dict[str, Any]:
    """Return what is known of `slora._C`: `available`, and `reason` where it is not.

    Where it is: `compiler`, `torch` (the version it was built for), `cpu` (the instructions it runs on), `cuda` (the
    toolkit's version, or None for a build without CUDA) and `architectures` (a list, such as ["8.0", "9.0+PTX"]).
    """
    module, reason = _extension()
    if module is None:
        return {"available": False, "reason": reason}
    info = dict(module.info())
    return {"available": True, "reason": None, **info, "architectures": info["architectures"].replace(";", " ").split()}


@functools.cache
def _extension() -> tuple[Any, str | None]:
    try:
        return importlib.import_module("slora._C"), None
    except ModuleNotFoundError:
        return None, "it was not built"
    except (ImportError, OSError) as error:
        return None, f"it does not load, which is so when it was built for another torch ({error})"


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"slora._C cannot be used: {reason}. Merging runs in plain PyTorch, which is several times slower. For the "
        f"fast one, install a C++ compiler (for CUDA also nvcc, and set CUDA_HOME) and run, in slora's sources: "
        f"pip install --no-build-isolation --no-deps --force-reinstall .",
        RuntimeWarning,
        stacklevel=4,
    )


def _use_extension(weights: Sequence[Tensor], terms: Sequence[Term]) -> bool:
    tensors = [*weights, *(matrix for term in terms for matrix in (term.A, term.B))]
    device = weights[0].device.type
    if backend() in ("torch", "reference") or device not in ("cpu", "cuda"):
        return False
    if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.is_neg() for tensor in tensors):
        return False
    if device == "cuda" and any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    module, reason = _extension()
    if module is None:
        _warn_once(str(reason))
        return False
    info = module.info()
    if device == "cuda" and info["cuda"] is None:
        _warn_once("it was built without CUDA")
        return False
    if device == "cuda" and not serves(torch.cuda.get_device_capability(weights[0].device), info["architectures"]):
        _warn_once(f"it has no code for this GPU, only for {info['architectures']}")
        return False
    # Without fused multiply-adds in the processor the extension is right, but slower than PyTorch.
    return device == "cuda" or info["cpu"] != "portable" or not _is_x86()


@functools.cache
def serves(capability: tuple[int, int], architectures: str) -> bool:
    """Whether code for `architectures`, such as "8.0;9.0;10.0+PTX", runs on a GPU of `capability`."""
    for name in architectures.replace(";", " ").split():
        known = re.fullmatch(r"(\d+)\.(\d+)(\+PTX)?", name)
        # Other names, such as "Hopper", are torch's to understand.
        if known is None:
            return True
        major, minor = int(known[1]), int(known[2])
        if (major, minor) <= capability and (known[3] or major == capability[0]):
            return True
    return False


@functools.cache
def _is_x86() -> bool:
    import platform

    return platform.machine().lower() in ("x86_64", "amd64")


def _flat(terms: Sequence[Term]) -> tuple[list[Tensor], list[Tensor], list[float], list[int], list[int]]:
    return (
        [term.A for term in terms],
        [term.B for term in terms],
        [term.scale for term in terms],
        [term.weight for term in terms],
        [term.first_row for term in terms],
    )
