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
faster. Under torch.compile and in CUDA graphs, where only the device knows which blocks are active, the first two alone
skip the others there, and are the only candidates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slora import addmm, room, tuning
from slora.backends import backend
from slora.dropout import rescaling


class Form(NamedTuple):
    """One way to compute an operation."""

    name: str
    config: Any = None
    """Tile sizes, for one of our kernels."""


class Shape(NamedTuple):
    """What a choice of form depends on, but for the number of rows."""

    operation: str
    K: int
    N: int
    blocks: int
    slots: int
    r: int
    rows: torch.dtype
    lora: torch.dtype
    precision: str | None
    """How products of fp32 are computed; None for other dtypes."""
    options: tuple[str, ...]
    """What else there is: bias, dropout, room, "listed" where the host knows the active blocks, unaligned."""

    def __str__(self) -> str:
        sizes = f"K={self.K} N={self.N} blocks={self.blocks} slots={self.slots} r={self.r}"
        words = [self.operation, sizes, f"{self.rows}/{self.lora}".replace("torch.", ""), self.precision, *self.options]
        return " ".join(word for word in words if word)


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

    def compute(form: Form) -> tuple[Tensor, Tensor]:
        if form.name == "addmm":
            return vendor()
        if form.name == "concat":
            assert wide is not None
            return concatenated(wide)
        products = S() if form.name == "accumulate" else None
        return linear_forward.forward(
            x_rows, W, bias, A, B, gate, threshold, scaling, slots, dropout, seed, products, form.config
        )

    def candidates() -> list[Form]:
        others = [Form("addmm")] + [Form("concat")] * (wide is not None)
        return _gemm_forms(linear_forward.plan, x_rows, W, A, dropout) + others * _vendor_serves(active, x_rows)

    wide = room.widened(x_rows, slots * lora_A.shape[1])
    listed = active is not None
    present = {"bias": bias is not None, "dropout": dropout > 0, "room": wide is not None, "listed": listed}
    y, products = _run(_shape("forward", x_rows, W, lora_A, lora_B, slots, present), x_rows, candidates, compute)
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

    def vendor() -> tuple[Tensor, Tensor]:
        products = T()
        low = _present(A, gate, threshold, active, dy.dtype).reshape(-1, A.shape[2])
        return (dy @ weight).addmm_(products, low, alpha=scaling), products

    def compute(form: Form) -> tuple[Tensor, Tensor]:
        if form.name == "addmm":
            return vendor()
        products = T() if form.name == "accumulate" else None
        return linear_backward.input_gradient(
            dy, W, A, B, gate, threshold, scaling, slots, dropout, seed, products, form.config
        )

    def candidates() -> list[Form]:
        # cuBLAS would need the update in memory, to mask it.
        others = [Form("addmm")] * (not dropout and _vendor_serves(active, dy))
        return _gemm_forms(linear_backward.plan, dy, W, A, dropout) + others

    options = {"dropout": dropout > 0, "listed": active is not None}
    shape = _shape("input gradient", dy, W, A, B, slots, options)
    result: tuple[Tensor, Tensor] = _run(shape, dy, candidates, compute)
    return result


def _weight_gradients(
    x: Tensor | None, dy: Tensor, S: Tensor, T: Tensor | None, A: Tensor, B: Tensor, gate: Tensor, threshold: float,
    scaling: float, active: Sequence[int] | None, slots: int, needs: Sequence[bool], dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    from slora.kernels import weight_gradients

    def compute(form: Form) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if form.name == "addmm":
            assert active is not None
            return addmm.weight_gradients(x, dy, S, T, A, B, active, scaling, needs)
        return weight_gradients.weight_gradients(
            x, dy, S if needs[1] or needs[2] else None, T if needs[0] else None, A, B, gate, threshold, scaling, needs,
            dropout, seed, form.config,
        )  # fmt: skip

    def candidates() -> list[Form]:
        forms = [Form("one pass", config) for config in weight_gradients.candidates(A, dy, slots, needs)]
        return forms + ([Form("addmm")] if active is not None and not dropout else [])

    operation = f"weight gradients {''.join('01'[need] for need in needs)}"
    options = {"dropout": dropout > 0, "listed": active is not None, _alignment("x", x): True}
    shape = _shape(operation, dy, None, A, B, slots, options)
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None] = _run(shape, dy, candidates, compute)
    return gradients


def _gemm_forms(plan: Callable[..., Any], rows: Tensor, weight: Tensor, A: Tensor, dropout: float) -> list[Form]:
    """`fused` and `accumulate` with each of their tile sizes, the default ones first."""
    from slora.kernels import configs

    forms = []
    for name, given in (("fused", False), ("accumulate", True)):
        # Above this rank S and T do not fit into the registers beside the accumulator of the base product.
        if given or A.shape[1] <= configs.MAX_FUSED_RANK:
            forms += [Form(name, config) for config in plan(rows, weight, A, given, dropout > 0.0).candidates]
    return forms


def _vendor_serves(active: Sequence[int] | None, rows: Tensor) -> bool:
    """Whether forms of cuBLAS are candidates. Where only the device knows the active blocks they compute every one.

    A choice made while all are active would then cost the update of every block after most have been switched off.
    Exact products of fp32 are an exception, for which our tiles are slow.
    """
    from slora.kernels import launch

    return active is not None or launch.kind(rows.dtype) == "ieee"


# What was chosen before, so that a call does not build the candidates anew.
_chosen: dict[tuple[Any, ...], Form] = {}


def _run(shape: Shape, rows: Tensor, candidates: Callable[[], list[Form]], compute: Callable[[Form], Any]) -> Any:
    """Compute with the first of our kernels where the backend is pinned to them, else with the fastest form."""
    pinned = backend() == "triton"
    place = shape, rows.device, "pinned" if pinned else tuning.scope(rows.shape[0])
    form = _chosen.get(place)
    if form is None:
        forms = candidates()
        found = forms[0] if pinned else _fastest(shape, rows, forms, compute)
        form = found or forms[0]
        if found is not None:
            _chosen[place] = found
    return compute(form)


def _fastest(shape: Shape, rows: Tensor, forms: list[Form], compute: Callable[[Form], Any]) -> Form | None:
    if shape.precision == "ieee":
        # Exact products of fp32 use no tensor cores, and there our tiles have nothing that cuBLAS has not.
        forms.sort(key=lambda form: form.config is not None)
    names: dict[str, Form] = {}
    for form in forms:
        number = sum(other.name == form.name for other in names.values())
        names[f"{form.name} {number}" if number else form.name] = form
    calls = {name: functools.partial(compute, form) for name, form in names.items()}
    name = tuning.choose(str(shape), rows.shape[0], rows.device, calls)
    return None if name is None else names[name]


def _shape(
    operation: str, rows: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, slots: int, options: Mapping[str, bool]
) -> Shape:
    blocks, r, K = A.shape
    words = [name for name, there in options.items() if name and there]
    words += [word for name, t in (("rows", rows), ("W", weight), ("A", A[0])) if (word := _alignment(name, t))]
    precision = torch.backends.cuda.matmul.fp32_precision if rows.dtype == torch.float32 else None
    # "none" is PyTorch's default, which is exact.
    precision = "ieee" if precision == "none" else precision
    N = blocks * B.shape[1]
    return Shape(operation, K, N, blocks, slots, r, rows.dtype, A.dtype, precision, tuple(words))


def _alignment(name: str, matrix: Tensor | None) -> str:
    """What keeps the copy engine ("unaligned") or the compiler ("uneven") from reading 16 bytes at a time, or ''."""
    if matrix is None:
        return ""
    stride = matrix.stride(0)
    if matrix.data_ptr() % 16 or stride * matrix.element_size() % 16 or stride < matrix.shape[1]:
        return f"unaligned {name}"
    # Numbers of which Triton is told that they are multiples of 16.
    return f"uneven {name}" if stride % 16 else ""


def _present(
    matrices: Tensor, gate: Tensor, threshold: float, active: Sequence[int] | None, dtype: torch.dtype
) -> Tensor:
    """The A or B of every slot, in `dtype`: the active ones, or all with zeros for the inactive ones."""
    if active is not None:
        return addmm.chosen(matrices, active).to(dtype)
    return torch.where((gate >= threshold)[:, None, None], matrices, 0).to(dtype)
