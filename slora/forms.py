"""The operator in Triton kernels: its forms, and which of them runs.

| form | forward | input gradient |
|---|---|---|
| `fused` | S inside the main loop of the base product | T inside the main loop |
| `accumulate` | S by a skinny product, read once at the end of the base product | T likewise |
| `addmm` | S by a skinny product, base product by cuBLAS, `addmm_` of the update | T likewise |
| `concat` | S by a skinny product, base product and update as one of cuBLAS, which is wider | |

All of them leave the same S and T, so that forward and backward may take different ones. `concat` multiplies x and c S
side by side with W and B side by side, where the producer of x left room behind its rows (`slora.room`). dA, dB and the
gates' gradients are one pass over x and dy (`slora.kernels.weight_gradients`), or cuBLAS products where those are
faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slora import addmm, room, tuning
from slora.backends import backend
from slora.dropout import rescaling

if TYPE_CHECKING:
    from slora.kernels import configs, narrow_configs


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gate: Tensor,
    threshold: float,
    scaling: float,
    active: Sequence[int] | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return `(y [..., N], S [M, slots * r])` as `torch.ops.slora.selective_linear` states them."""
    from slora.kernels import linear_forward, skinny

    x_rows = addmm.unit_stride(addmm.rows(x))
    blocks = lora_A.shape[0]
    slots = blocks if active is None else len(active)
    gate, threshold = addmm.fp32_gate(gate, threshold)
    A, B, W = lora_A.contiguous(), lora_B.contiguous(), weight.contiguous()

    def S(behind: Tensor | None = None) -> Tensor:
        c = scaling * rescaling(dropout)
        return skinny.products_S(x_rows, A, gate, threshold, slots, dropout, seed, behind, c)

    def one_kernel(config: configs.Gemm, given: bool) -> tuple[Tensor, Tensor]:
        products = S() if given else None
        return linear_forward.forward(
            x_rows, W, bias, A, B, gate, threshold, scaling, slots, dropout, seed, products, config
        )

    def vendor() -> tuple[Tensor, Tensor]:
        products, c = S(), scaling * rescaling(dropout)
        y = F.linear(x_rows, weight, bias)
        present = range(blocks) if active is None else active
        columns = addmm.active_columns(y, B, present)
        for S_i, y_i, B_i in zip(
            addmm.blocks_of(products, slots), columns, _present(B, gate, threshold, active, x.dtype), strict=True
        ):
            y_i.addmm_(S_i, B_i.T, alpha=c)
        return y, products

    def concatenated(wide: Tensor) -> tuple[Tensor, Tensor]:
        products = S(wide[:, x_rows.shape[1] :])
        update = W.new_zeros(W.shape[0], wide.shape[1] - W.shape[1])
        n, r = B.shape[1:]
        low = _present(B, gate, threshold, active, x.dtype)
        for slot, (i, B_i) in enumerate(zip(range(blocks) if active is None else active, low, strict=True)):
            update[i * n : (i + 1) * n, slot * r : (slot + 1) * r] = B_i
        return F.linear(wide, torch.cat([W, update], 1), bias), products

    candidates = _one_kernel_candidates("forward", x_rows, W, A, dropout, one_kernel)
    candidates["addmm"] = vendor
    wide = room.widened(x_rows, slots * lora_A.shape[1])
    if wide is not None:
        candidates["concat"] = functools.partial(concatenated, wide)
    shape = _shape("forward", x_rows, lora_A, lora_B, slots, dropout, bias is not None, wide is not None)
    y, products = _run(shape, x_rows, candidates)
    return y.view(*x.shape[:-1], weight.shape[0]), products


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gate: Tensor,
    S: Tensor,
    threshold: float,
    scaling: float,
    active: Sequence[int] | None,
    dropout: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return `(dx [M, K], dA, dB, dgate)` for `dy [M, N]`, `x [M, K]` and the S of `forward`."""
    from slora.kernels import skinny

    need_dx, *needs_weights = needs
    dy = addmm.unit_stride(dy)
    x = None if x is None else addmm.unit_stride(x)
    blocks = lora_A.shape[0]
    slots = blocks if active is None else len(active)
    gate, threshold = addmm.fp32_gate(gate, threshold)
    A, B = lora_A.contiguous(), lora_B.contiguous()
    dx = T = None
    if need_dx:
        dx, T = _input_gradient(dy, weight, A, B, gate, threshold, scaling, active, slots, dropout, seed)
    elif needs_weights[0]:
        T = skinny.products_T(dy, B, gate, threshold, slots)
    if not any(needs_weights):
        return dx, None, None, None
    gradients = _weight_gradients(
        x, dy, S, T, A, B, gate, threshold, scaling, active, slots, needs_weights, dropout, seed
    )
    return dx, *gradients


def _input_gradient(
    dy: Tensor, weight: Tensor, A: Tensor, B: Tensor, gate: Tensor, threshold: float, scaling: float,
    active: Sequence[int] | None, slots: int, dropout: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from slora.kernels import linear_backward, skinny

    W = weight.contiguous()

    def T() -> Tensor:
        return skinny.products_T(dy, B, gate, threshold, slots)

    def one_kernel(config: configs.Gemm, given: bool) -> tuple[Tensor, Tensor]:
        products = T() if given else None
        return linear_backward.input_gradient(
            dy, W, A, B, gate, threshold, scaling, slots, dropout, seed, products, config
        )

    def vendor() -> tuple[Tensor, Tensor]:
        products = T()
        low = _present(A, gate, threshold, active, dy.dtype).reshape(-1, A.shape[2])
        return (dy @ weight).addmm_(products, low, alpha=scaling), products

    candidates = _one_kernel_candidates("backward", dy, W, A, dropout, one_kernel)
    if not dropout:
        # cuBLAS would need the update in memory, to mask it.
        candidates["addmm"] = vendor
    result: tuple[Tensor, Tensor] = _run(_shape("input gradient", dy, A, B, slots, dropout), dy, candidates)
    return result


def _weight_gradients(
    x: Tensor | None, dy: Tensor, S: Tensor, T: Tensor | None, A: Tensor, B: Tensor, gate: Tensor, threshold: float,
    scaling: float, active: Sequence[int] | None, slots: int, needs: Sequence[bool], dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    from slora.kernels import weight_gradients

    def one_pass(config: narrow_configs.Columns) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return weight_gradients.weight_gradients(
            x, dy, S if needs[1] or needs[2] else None, T if needs[0] else None, A, B, gate, threshold, scaling, needs,
            dropout, seed, config,
        )  # fmt: skip

    def vendor() -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        assert active is not None
        return addmm.weight_gradients(x, dy, S, T, A, B, active, scaling, needs)

    candidates: dict[str, Callable[[], Any]] = {
        f"one pass {i}" if i else "one pass": functools.partial(one_pass, config)
        for i, config in enumerate(weight_gradients.candidates(A, dy, slots, needs))
    }
    if active is not None and not dropout:
        candidates["addmm"] = vendor
    shape = _shape(f"weight gradients {''.join('01'[need] for need in needs)}", dy, A, B, slots, dropout)
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None] = _run(shape, dy, candidates)
    return gradients


def _one_kernel_candidates(
    kernel: configs.Kernel,
    rows: Tensor,
    weight: Tensor,
    A: Tensor,
    dropout: float,
    call: Callable[[configs.Gemm, bool], tuple[Tensor, Tensor]],
) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """`fused` and `accumulate` with each of their tile sizes, the default ones first."""
    from slora.kernels import configs, linear_backward, linear_forward

    plan = linear_forward.plan if kernel == "forward" else linear_backward.plan
    candidates: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {}
    for form, given in (("fused", False), ("accumulate", True)):
        # Above this rank S and T do not fit into the registers beside the accumulator of the base product.
        if given or A.shape[1] <= configs.MAX_FUSED_RANK:
            for i, config in enumerate(plan(rows, weight, A, given, dropout > 0.0).candidates):
                candidates[f"{form} {i}" if i else form] = functools.partial(call, config, given)
    return candidates


def _run(shape: str, rows: Tensor, candidates: Mapping[str, Callable[[], Any]]) -> Any:
    """Run the first candidate where the backend is pinned to the kernels, else the fastest."""
    if backend() == "triton":
        return next(iter(candidates.values()))()
    return candidates[tuning.choose(shape, rows.shape[0], rows.device, candidates)]()


def _shape(
    operation: str,
    rows: Tensor,
    A: Tensor,
    B: Tensor,
    slots: int,
    dropout: float,
    bias: bool = False,
    wide: bool = False,
) -> str:
    """The shape class without the rows, as the cache of choices spells it."""
    blocks, r, K = A.shape
    words = [operation, f"K={K} N={blocks * B.shape[1]} blocks={blocks} slots={slots} r={r}"]
    words.append(f"{rows.dtype}/{A.dtype}".replace("torch.", ""))
    if rows.dtype == torch.float32:
        words.append(torch.backends.cuda.matmul.fp32_precision)
    return " ".join(words + ["bias"] * bias + ["dropout"] * (dropout > 0) + ["room"] * wide)


def _present(
    matrices: Tensor, gate: Tensor, threshold: float, active: Sequence[int] | None, dtype: torch.dtype
) -> Tensor:
    """The A or B of every slot, in `dtype`: the active ones, or all with zeros for the inactive ones."""
    if active is not None:
        return addmm.chosen(matrices, active).to(dtype)
    return torch.where((gate >= threshold)[:, None, None], matrices, 0).to(dtype)
