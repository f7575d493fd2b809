"""The tensors of an adapter: read, checked, and divided among layers and saved modules."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from slora.adapters.selective_json import CONFIG, PREFIX, SELECTIVE, WEIGHTS, Entry, Selective, read_selective
from slora.errors import CheckpointError, StateError
from slora.io.atomic import earlier
from slora.io.bounded import require_file
from slora.models.full_precision import DTYPES_16_BIT
from slora.models.modules_to_save import Saved
from slora.module_tree.sharded import is_sharded
from slora.module_tree.wrappers import unwrapped

# Attempts to read an adapter while another process saves new ones.
_ATTEMPTS = 8


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values of CPU tensors; their order does not matter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_adapter(folder: Path) -> tuple[Selective, dict[str, Tensor]]:
    """Return `selective.json` of the adapter in `folder`, and its tensors.

    If another process replaces them meanwhile, both are read again.

    Raises:
        CheckpointError: see `read_selective` and `read_tensors`.
    """
    for attempt in range(_ATTEMPTS):
        before = _versions(folder)
        try:
            content = read_selective(folder)
            return content, read_tensors(folder, content.tensors_digest)
        except CheckpointError:
            if attempt + 1 == _ATTEMPTS or _versions(folder) == before:
                raise
            time.sleep(0.02 * attempt)
    raise AssertionError("unreachable")


def _versions(folder: Path) -> list[tuple[int, int] | None]:
    """Inodes and times of the files in `folder`, which change when a file is replaced or removed."""
    found: list[tuple[int, int] | None] = []
    for name in (SELECTIVE, WEIGHTS):
        for path in (folder / name, earlier(folder / name)):
            try:
                status = path.stat()
                found.append((status.st_ino, status.st_mtime_ns))
            except OSError:
                found.append(None)
    return found


def read_tensors(folder: Path, digest: str | None) -> dict[str, Tensor]:
    """Return the tensors of the adapter in `folder`, after checking their digest if `digest` is given.

    Raises:
        CheckpointError: the file is missing or damaged, or not the one that `selective.json` was written with.
    """
    path = folder / WEIGHTS
    if earlier(path).exists():
        # Saving was interrupted: the present file may already be that of the next adapter. The digest says which file
        # `selective.json` belongs to; early versions wrote none, and then it is the earlier file.
        with contextlib.suppress(CheckpointError):
            tensors = read_safetensors(earlier(path))
            if digest in (None, digest_of(tensors)):
                return tensors
    tensors = read_safetensors(path)
    if digest not in (None, digest_of(tensors)):
        raise CheckpointError(
            f"{path} holds other tensors than {SELECTIVE} was written with: copy both files of one adapter. Where the "
            f'tensors were changed on purpose, remove "tensors_digest" from {SELECTIVE}'
        )
    return tensors


def read_safetensors(
    path: Path, remedy: str = "it may be damaged", error_type: type[CheckpointError] = CheckpointError
) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Args:
        remedy: end of the message where the file is unreadable; `error_type` is then raised.

    Raises:
        CheckpointError: the file is missing, not a regular file, or unreadable.
    """
    require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    # Unknown dtypes, names or shapes in a damaged header raise Python's own errors; a file removed meanwhile
    # RuntimeError.
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise error_type(f"{path} is not a readable safetensors file ({str(error)[:200]}); {remedy}") from error


def spread_sample(weight: Tensor, count: int = 256) -> Tensor:
    """Return up to `count` elements of `weight`, spread evenly over it."""
    flat = weight.reshape(-1)
    return flat[:: max(1, flat.numel() // count)][:count]


def forget_earlier(folder: Path) -> None:
    """Remove the earlier files in `folder` if saving was interrupted when the adapter was already complete.

    `write_together` leaves them where they are, so that readers would be led to them if the next save is interrupted.
    """
    if not earlier(folder / WEIGHTS).exists():
        return
    with contextlib.suppress(CheckpointError):
        if read_selective(folder).tensors_digest == digest_of(read_safetensors(folder / WEIGHTS)):
            for name in (CONFIG, WEIGHTS):
                earlier(folder / name).unlink(missing_ok=True)


def is_finite(value: Tensor, mask: bool = False) -> bool:
    """Whether a tensor holds neither NaN nor infinity; in a `mask` infinities are allowed."""
    if not value.is_floating_point() and not value.is_complex():
        return True
    # float8 lacks these operators.
    wide = value.float() if value.itemsize == 1 else value
    if mask or not value.numel() or value.is_complex():
        return not bool(wide.isnan().any()) if mask else bool(wide.isfinite().all())
    # Ten times as fast as isfinite().all() on the CPU; minimum and maximum are both NaN if any value is.
    return all(bool(end.isfinite()) for end in torch.aminmax(wide))


def refuse_not_finite(tensors: Mapping[str, Tensor], buffers: Collection[str]) -> None:
    """Refuse tensors that are not finite; those named in `buffers` may be masks with infinities.

    Raises:
        StateError: names the first.
    """
    for name, value in tensors.items():
        if not is_finite(value.detach(), name in buffers):
            raise StateError(f"{name!r} holds NaN or infinity: training diverged; go back to an earlier checkpoint")


def block_state(
    name: str, entry: Entry, shape: list[int], like: Mapping[str, Tensor], tensors: dict[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """Take the tensors of one layer out of `tensors`; return new values of its parameters by name.

    Args:
        shape: of the adapted weight.
        like: `{parameter name: a tensor of its dtype and device}`; without "lora_A" the matrices were freed.
    """
    state = {"gate": torch.tensor(entry.gate).to(like["gate"])}
    if "lora_A" not in like:
        if entry.active:
            raise CheckpointError(f"{name!r} was freed by inactive='frozen'; load {folder} into the plain model")
        return state
    r, blocks, active = entry.r, entry.blocks, entry.active
    n, K = shape[0] // blocks, shape[1]
    lora_A, lora_B = torch.empty(blocks, r, K), torch.zeros(blocks, n, r)
    # Inactive blocks are not in the file: A is drawn again, B is zero.
    for A_i in lora_A:
        nn.init.kaiming_uniform_(A_i, a=5**0.5)
    if active:
        keys = [f"{PREFIX}{name}.lora_{letter}.weight" for letter in "AB"]
        A, B = (_take(tensors, key, folder) for key in keys)
        expected = [len(active) * r, K], [blocks * n, len(active) * r]
        if (list(A.shape), list(B.shape)) != expected:
            raise CheckpointError(
                f"{folder / WEIGHTS}: A and B of {name!r} have shapes {list(A.shape)} and {list(B.shape)}; "
                f"expected {expected[0]} and {expected[1]}"
            )
        A, B = (_converted(value, key, torch.float32, folder) for key, value in zip(keys, (A, B), strict=True))
        for j, i in enumerate(active):
            lora_A[i] = A[j * r : (j + 1) * r]
            lora_B[i] = B[i * n : (i + 1) * n, j * r : (j + 1) * r]
    for key, value in (("lora_A", lora_A), ("lora_B", lora_B)):
        state[key] = _converted(value, f"{name}.{key}", like[key].dtype, folder).to(like[key].device)
    return state


def saved_state(
    model: nn.Module, saved: Saved, tensors: dict[str, Tensor], folder: Path, *, injected: bool
) -> dict[str, Tensor]:
    """Take the tensors of `modules_to_save` out of `tensors`: new values by name, on the device of the old ones.

    Args:
        injected: whether the model is already adapted. Injection converts 16-bit modules to fp32.
    """
    buffers = saved.buffers(model)
    present, single = saved.tensors(model), set(saved.parameters)
    values: dict[str, Tensor] = {}
    first: dict[tuple[int, ...], str] = {}
    for name, own in present.items():
        value = _take(tensors, f"{PREFIX}{name}", folder)
        if value.shape != own.shape:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name} has shape {list(value.shape)}, the model's has "
                f"{list(own.shape)}; build the model with the same number of outputs"
            )
        widened = not injected and own.dtype in DTYPES_16_BIT and (name not in single or not own.dim())
        dtype = torch.float32 if widened else own.dtype
        values[name] = _converted(value, name, dtype, folder, mask=name in buffers).to(own.device)
        if is_sharded(own) or not own.numel():
            continue
        other = first.setdefault((own.data_ptr(), *own.shape, *own.stride()), name)
        # Tied tensors must have equal values in the file.
        if not torch.equal(values[name], values[other]):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name} and {other} differ, but are one tensor in this "
                f"{type(unwrapped(model)).__name__}"
            )
    return values


def _take(tensors: dict[str, Tensor], key: str, folder: Path) -> Tensor:
    if key not in tensors:
        raise CheckpointError(f"{folder / WEIGHTS} lacks {key!r}; the file is incomplete")
    return tensors.pop(key)


def _converted(value: Tensor, name: str, dtype: torch.dtype, folder: Path, mask: bool = False) -> Tensor:
    """`value` converted to `dtype`, if it has that or both are floating-point types, and checked to be finite."""
    if value.dtype != dtype and not (value.is_floating_point() and dtype.is_floating_point):
        raise CheckpointError(f"{folder / WEIGHTS}: {name} has dtype {value.dtype}, expected {dtype}")
    result = value.to(dtype)
    if not is_finite(result, mask):
        raise CheckpointError(
            f"{folder / WEIGHTS}: {name} holds NaN or values that are not finite in {dtype}; its training diverged, or "
            f"the file is damaged"
        )
    return result
