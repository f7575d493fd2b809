"""FLOPs by counting, bytes by formula, and what part of the ceilings a time is.

FLOPs come from PyTorch's counter, which knows slora's operator by the formulas of `slora.ops.flops`. Bytes are the
least that a form of the computation has to move through memory, in elements of the activations' dtype, with
`x [M, K]`, `dy [M, N]` and everything of size r left out:

    frozen       forward x + W + y, backward dy + W + dx
    eager          one kernel per step, as PEFT computes        + 6 MK + 10 MN
    addmm          added in place to y and dx                   + 4 MK +  4 MN
    cublas_after   the same
    cublas_before  the same, but y and dx are read by the GEMM  + 4 MK +  4 MN
    precomputed    S and T first, then added to the accumulator + 2 MK +  2 MN
    split          x and dy by two launches                     + 2 MK +  2 MN
    fused          S and T in the main loops, too               +   MK +    MN
    full           the dense weight gradient                    +   MK +    MN + NK

Two forms, as in "fused/split", are those of the forward and of the backward.
Of a call of a whole model `Compulsory` says what is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import slora
from slora.ops.flops import count_flops


class Extra(NamedTuple):
    """Elements moved beyond a frozen layer: multiples of MK, MN and NK in the forward and in the backward."""

    forward_MK: int
    forward_MN: int
    backward_MK: int
    backward_MN: int
    backward_NK: int = 0


FORMS = {
    "frozen": Extra(0, 0, 0, 0),
    "eager": Extra(1, 6, 5, 4),
    "addmm": Extra(1, 2, 3, 2),
    "cublas_after": Extra(1, 2, 3, 2),
    "cublas_before": Extra(1, 2, 3, 2),
    "precomputed": Extra(1, 0, 1, 2),
    "split": Extra(1, 0, 1, 2),
    "fused": Extra(0, 0, 1, 1),
    "full": Extra(0, 0, 1, 1, backward_NK=1),
}


def flops(call: Callable[[], Any]) -> int:
    """FLOPs of the matrix products of one call, backward included where it runs one."""
    return count_flops(call)


def bytes_moved(form: str, M: int, N: int, K: int, element: int, share: float = 1.0, backward: bool = True) -> int:
    """Bytes that `form` has to move; `share` is the active share of the blocks, which scales what touches MN."""
    first, last = (FORMS[name] for name in (form.split("/") * 2)[:2])
    on, frozen = share > 0, M * K + N * K + M * N
    elements = frozen + on * first.forward_MK * M * K + share * first.forward_MN * M * N
    if backward:
        elements += frozen + on * (last.backward_MK * M * K + last.backward_NK * N * K)
        elements += share * last.backward_MN * M * N
    return round(elements * element)


def lora_flops(M: int, N: int, K: int, r: int, active: float, share: float, backward: bool = True) -> float:
    """FLOPs of the low-rank update: `active` products of width r with K, and the `share` of N that they cover.

    S and its update in the forward; T, dx, dA and dB in the backward.
    """
    products = 3 if backward else 1
    return 2.0 * M * r * products * (active * K + share * N)


@dataclass(frozen=True)
class Compulsory:
    """Bytes that one call of a whole model cannot do without, counted alike for every contender.

    A formula, and less than the traffic: what one kernel hands to the next and nobody keeps is left out.

    Attributes:
        parameters: read once; A and B of inactive blocks only where the call looks at them.
        inputs: read once.
        output: written once; none of a training step.
        again: parameters and inputs that autograd keeps for the backward, which reads them once more.
        kept: activations that autograd keeps for the backward: written once, read once.
        trained: parameters that got a gradient: it is written and read, and AdamW reads and writes the parameter and
            two moments.
    """

    parameters: int
    inputs: int
    output: int = 0
    again: int = 0
    kept: int = 0
    trained: int = 0

    @property
    def moved(self) -> int:
        """All of it, each part as often as it is read or written."""
        return self.parameters + self.inputs + self.output + self.again + 2 * self.kept + 8 * self.trained

    @property
    def beside_inputs(self) -> int:
        """The memory behind it, inputs left out: every byte once."""
        return self.parameters + self.output + self.kept + 3 * self.trained


def of_forward(net: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> Compulsory:
    """What a forward without gradients cannot do without."""
    return Compulsory(parameters_read(net, gradients=False), sum(t.nbytes for t in inputs), output.nbytes)


def of_step(
    step: Callable[[], Any], net: nn.Module, inputs: Sequence[Tensor], optimizer: torch.optim.Optimizer,
    existing: Mapping[int, int],
) -> Compulsory:  # fmt: skip
    """Take one eager training step and return what it cannot do without.

    `existing`: the storages that were there before, as `storages` gives them.
    """
    saved: dict[int, int] = {}
    trained = 0

    def keep(tensor: Tensor) -> Tensor:
        saved.update(storages([tensor]))
        return tensor

    def updated(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal trained
        trained = sum(p.nbytes for group in optimizer.param_groups for p in group["params"] if p.grad is not None)

    parameters = parameters_read(net, gradients=True)
    handle = optimizer.register_step_pre_hook(updated)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            step()
    finally:
        handle.remove()
    again = sum(size for address, size in saved.items() if address in existing)
    return Compulsory(
        parameters, sum(t.nbytes for t in inputs), again=again, kept=sum(saved.values()) - again, trained=trained
    )


def parameters_read(net: nn.Module, gradients: bool) -> int:
    """Bytes of the parameters that a forward of `net` reads, with or without gradients."""
    unread = 0
    for _, layer in slora.layers.adapted_layers(net):
        activity = layer.activity()
        if not (gradients and activity.probe and layer.inactive != "frozen"):
            unread += (layer.lora_A.nbytes + layer.lora_B.nbytes) * len(activity.inactive) // layer.blocks
    return sum(p.nbytes for p in net.parameters()) - unread


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """`{address: bytes}` of the memory behind `tensors`, each storage once."""
    found = (t.untyped_storage() for t in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def beside_time(
    ceilings: dict[str, Any], dtype: str, seconds: float, flops: float, moved: float | None
) -> dict[str, float]:
    """The rate, and what part of the measured GEMM and copy ceilings `flops` and `moved` bytes are, in percent.

    `moved`: None where it is not known.
    """
    gemm = ceilings["gemm_flops_per_s"].get(dtype)
    return {
        "flops_per_s": flops / seconds,
        **({"percent_of_gemm": 100 * flops / seconds / gemm} if gemm else {}),
        **({"percent_of_copy": 100 * moved / seconds / ceilings["copy_bytes_per_s"]} if moved is not None else {}),
    }


def beside_time_of(row: Mapping[str, Any], ceilings: dict[str, Any], dtype: str) -> dict[str, float]:
    """The same for a row of a whole model, which has "seconds"; nothing where it could not be counted."""
    if "compulsory_bytes" not in row:
        return {}
    return beside_time(ceilings, dtype, row["seconds"]["median"], row["flops"], row["compulsory_bytes"])


def predicted_seconds(
    frozen: float, form: str, M: int, N: int, K: int, r: int, active: int, share: float, dtype: str, element: int,
    ceilings: dict[str, Any],
) -> float:  # fmt: skip
    """Forward and backward by the model of costs: the frozen layer's measured time, then the update's bytes at the
    copy ceiling and its FLOPs at the GEMM ceiling, one after the other. Of the form "fused" it is the floor: x and dy
    have to be read once more, for dA and dB, when T is complete."""
    extra = bytes_moved(form, M, N, K, element, share) - bytes_moved("frozen", M, N, K, element)
    copy: float = ceilings["copy_bytes_per_s"]
    gemm: float = ceilings["gemm_flops_per_s"][dtype]
    return frozen + extra / copy + lora_flops(M, N, K, r, active, share) / gemm
