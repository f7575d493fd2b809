"""Parameters that are sharded over processes: the `DTensor`s of FSDP2's `fully_shard`.

All processes have to make the calls in here together: a tensor is gathered from them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slora.errors import StateError


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`."""
    return hasattr(tensor, "full_tensor")


def refuse(model: nn.Module, what: str) -> None:
    """Raise `StateError` if a parameter of `model` is sharded; `what` is the end of the message, with the remedy."""
    reshard(model)
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise StateError(f"{name!r} is sharded over processes by fully_shard; {what}")


@contextlib.contextmanager
def by_first(sharded: bool) -> Iterator[bool]:
    """Yield whether this process writes what all have gathered; if sharded, all processes wait for that at the end."""
    if not sharded:
        yield True
        return
    yield torch.distributed.get_rank() == 0
    torch.distributed.barrier()


def reshard(model: nn.Module) -> None:
    """Put the sharded parameters back where FSDP has left gathered copies in their place after a forward.

    A write into such a copy would be lost.
    """
    for module in model.modules():
        # fully_shard gives a module a class of its own with these methods.
        if hasattr(type(module), "set_reshard_after_forward"):
            module.reshard()  # type: ignore[operator]


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, differentiable; one that is not sharded itself."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, for changes element by element in place."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def put(target: Any, value: Tensor) -> None:
    """Copy `value`, the same in all processes, into `target`, of which each may hold a part."""
    if is_sharded(target):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = target.device_mesh
        value = DTensor.from_local(value.to(target.device, target.dtype), mesh, [Replicate()] * mesh.ndim)
        value = value.redistribute(placements=target.placements)
    target.copy_(value)
