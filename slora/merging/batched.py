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
A GPU gives fp32 weights the bits of the CPU. bf16 and fp16 weights go through its tensor cores: their sum has an order
of its own and R + 10 in place of R + 2, by published measurements of the hardware (`csrc/merge_kernel.cuh`).

Without the extension PyTorch computes the same in fp32 with an order of summation of its own, within the same bound.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from slora.merging import fallback
from slora.merging.terms import Term, check, grouped, is_plain
from slora.models.exclusive import signals_held
from slora.ops.dispatch import setting

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

    Every check precedes the first write, and an exception leaves all weights as they were; a signal such as Ctrl-C
    waits until all of them are written. Nothing is recorded for autograd. A term whose scale is 0 or whose rank is 0
    leaves the bits of its rows alone.

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
        ConfigError: a scale is no finite number, or a row no integer.
    """
    merge_terms_(weights, grouped(weights, lora_As, lora_Bs, scales, rows, names), names, whole=rows is None)


def merge_terms_(
    weights: Sequence[Tensor],
    terms: Sequence[Term],
    names: Sequence[str] | None,
    *,
    whole: bool = False,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """Do what `batched_merge_` says; `whole` refuses terms that cover a part of the rows.

    `copies`, contiguous tensors like `weights`, receive the old weights. Once the version counter of a weight has
    moved, its copy is complete.
    """
    weights = list(weights)
    extension = _extension_for(weights, terms)
    adjacent = extension and all(W.shape[1] <= 1 or W.stride(1) == 1 for W in weights)
    if not adjacent or (torch.is_grad_enabled() and any(W.requires_grad for W in weights)):
        check(weights, terms, names, in_place=True, whole=whole)
    if not weights:
        return
    with torch.no_grad(), signals_held():
        if extension and adjacent:
            with _better_errors(weights, terms, names, in_place=True, whole=whole):
                torch.ops.slora.batched_merge_(weights, *_flat(terms, whole), copies or [])
            return
        for W, copy in zip(weights, copies or weights, strict=True):
            if copy is not W:
                copy.copy_(W)
        if not extension:
            fallback.merge_(weights, terms, copies)
            return
        # The extension needs a column stride of 1; other layouts go through a copy, made before anything is written.
        with torch.inference_mode(False), torch.no_grad():
            contiguous = _adjacent(weights)
        torch.ops.slora.batched_merge_(contiguous, *_flat(terms, whole), [])
        for W, merged in zip(weights, contiguous, strict=True):
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
        ConfigError: a scale is no finite number, or a row no integer.
    """
    terms, whole = grouped(weights, lora_As, lora_Bs, scales, rows, names), rows is None
    weights = list(weights)
    with torch.no_grad():
        if not _extension_for(weights, terms):
            check(weights, terms, names, in_place=False, whole=whole)
            return fallback.merge(weights, terms)
        with _better_errors(weights, terms, names, in_place=False, whole=whole):
            results: list[Tensor] = torch.ops.slora.batched_merge(_adjacent(weights), *_flat(terms, whole))
        return results


@contextlib.contextmanager
def _better_errors(
    weights: Sequence[Tensor], terms: Sequence[Term], names: Sequence[str] | None, *, in_place: bool, whole: bool
) -> Iterator[None]:
    """Replace an error of the operator by that of `check`, which knows the names but would slow every call."""
    try:
        yield
    except Exception:
        check(weights, terms, names, in_place=in_place, whole=whole)
        raise


def _adjacent(weights: Sequence[Tensor]) -> list[Tensor]:
    return [W if W.shape[1] <= 1 or W.stride(1) == 1 else W.contiguous() for W in weights]


def extension_info() -> dict[str, Any]:
    """Return what is known of `slora._C`: `available`, and `reason` where it is not.

    Where it is: `compiler`, `torch` (the version it was built for), `cpu` (the instructions it runs on, or that it
    leaves a processor without fused multiply-adds to PyTorch), `cuda` (the toolkit's version, or None for a build
    without CUDA) and `architectures` (a list, such as ["8.0", "9.0+PTX"]).
    """
    module, reason = _extension()
    if module is None:
        return {"available": False, "reason": reason}
    info = dict(module.info())
    if info["cpu"] == "portable" and _is_x86():
        info["cpu"] = "not used: this processor has no fused multiply-adds, so PyTorch is faster"
    return {"available": True, "reason": None, **info, "architectures": info["architectures"].replace(";", " ").split()}


@functools.cache
def _extension() -> tuple[Any, str | None]:
    try:
        return importlib.import_module("slora._C"), None
    except ModuleNotFoundError:
        return None, _NOT_BUILT
    except (ImportError, OSError) as error:
        return None, f"it does not load, which is so when it was built for another torch ({error})"


_NOT_BUILT = "it was not built"
_BUILD = "run, in slora's sources: pip install --no-build-isolation --no-deps --force-reinstall ."


@functools.cache
def _warn_once(reason: str, remedy: str) -> None:
    # The warning shows the user's line, above the frames of slora and of torch's decorators.
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("slora", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"slora._C cannot be used: {reason}. Merging runs in plain PyTorch, which is several times slower. For the "
        f"fast one, {remedy}",
        RuntimeWarning,
        stacklevel=level,
    )


def _extension_for(weights: Sequence[Tensor], terms: Sequence[Term]) -> bool:
    """Whether the extension supports these tensors; not whether they fit together."""
    tensors = [*weights, *(matrix for term in terms for matrix in (term.A, term.B))]
    if not all(map(is_plain, tensors)) or not weights or any(W.dim() != 2 for W in weights):
        return False
    device = weights[0].device.type
    if setting() in ("torch", "reference") or device not in ("cpu", "cuda"):
        return False
    if device == "cuda" and any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    module, reason = _extension()
    if module is None:
        _warn_once(str(reason), f"install a C++ compiler and {_BUILD}" if reason == _NOT_BUILT else _BUILD)
        return False
    info = module.info()
    if device == "cuda" and info["cuda"] is None:
        _warn_once("it was built without CUDA", f"install the CUDA toolkit of this torch, set CUDA_HOME and {_BUILD}")
        return False
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability(weights[0].device)
        if not serves((major, minor), info["architectures"]):
            remedy = f"set TORCH_CUDA_ARCH_LIST={major}.{minor} and {_BUILD}"
            _warn_once(f"it has no code for this GPU, only for {info['architectures']}", remedy)
            return False
    # Without fused multiply-adds in the processor the extension is right, but slower than PyTorch.
    return device == "cuda" or info["cpu"] != "portable" or not _is_x86()


@functools.cache
def serves(capability: tuple[int, int], architectures: str) -> bool:
    """Whether code for `architectures`, such as "8.0;9.0;10.0+PTX", runs on a GPU of `capability`."""
    for name in architectures.replace(";", " ").split():
        known = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        # Names of other kinds, such as "Hopper", are left to torch.
        if known is None:
            return True
        major, minor = int(known[1]), int(known[2])
        # "9.0a" runs on 9.0 alone, "10.0f" on its family; neither has PTX that others could use.
        exactly = known[3] == "a" and (major, minor) != capability
        if (major, minor) <= capability and not exactly and (major == capability[0] or (known[4] and not known[3])):
            return True
    return False


@functools.cache
def _is_x86() -> bool:
    import platform

    return platform.machine().lower() in ("x86_64", "amd64")


def _flat(
    terms: Sequence[Term], whole: bool
) -> tuple[list[Tensor], list[Tensor], list[float], list[int], list[int] | None]:
    return (
        [term.A for term in terms],
        [term.B for term in terms],
        [term.scale for term in terms],
        [term.weight for term in terms],
        None if whole else [term.first_row for term in terms],
    )
