"""The operator in PyTorch calls: `F.linear` for the base, `addmm_` for the update.

The update is added in place to the base product, so nothing of size M x N is allocated beyond `y`, and only
`x` and `S` are saved for the backward. `S [M, packed * r]` holds the products of the active blocks side by side.
Where every block is active, one batched product computes all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slora.ops import dropout as counter
from slora.ops.backends import Gradients, Needs
from slora.ops.checks import check_input
from slora.ops.layout import block_columns, rows, scatter_blocks, select_blocks, zero_inactive
from slora.ops.operands import LoRAOperands


class Eager:
    """The backend of PyTorch calls; see the head of this file."""

    name = "eager"

    def supports(self, x: Tensor, operands: LoRAOperands | None) -> bool:
        """Every device, dtype and shape."""
        return True

    def cast(self, operands: LoRAOperands, dtype: torch.dtype) -> LoRAOperands:
        """Return `operands.cast(dtype)`."""
        return operands.cast(dtype)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, operands: LoRAOperands) -> tuple[Tensor, Tensor]:
        """Return `(y [..., N], S)`.

        Where the host does not know the active blocks (`active` is None on a GPU), every block is computed, with
        A = B = 0 for the inactive ones.
        """
        known, active, _ = _known(operands)
        y = base(x, weight, bias)
        x_rows = rows(x)
        if operands.dropout:
            x_rows = x_rows * _mask(operands, x_rows)
        S = F.linear(x_rows, _stacked(known.lora_A, active))
        if active:
            add_update(rows(y), S, known.lora_B, active, operands.factor)
        return y, S if operands.active is active else _spread(S, operands, active)

    def backward(
        self, dy: Tensor, x: Tensor | None, S: Tensor, weight: Tensor, operands: LoRAOperands, needs: Needs
    ) -> Gradients:
        """Return the gradients; `dgate_i = <dB_i, B_i>`, exact for active blocks."""
        every = operands.active is not None and len(operands.active) == operands.blocks
        if every and not operands.dropout and (operands.blocks == 1 or _batched(dy)):
            return _of_all_blocks(dy, x, S, weight, operands, needs)
        known, active, on = _known(operands)
        A, B, c = known.lora_A, known.lora_B, known.factor
        keep = _mask(operands, dy) if operands.dropout else None
        dx = T = None
        if needs.x or needs.lora_A:
            T = _times_B(dy, B, active)
            if needs.x:
                dx = dy @ weight
                if keep is None:
                    dx.addmm_(T, _stacked(A, active), alpha=c)
                else:
                    dx.addcmul_(T @ _stacked(A, active), keep, value=c)
        if needs.lora_A and keep is not None:
            assert x is not None
            x = x * keep
        if operands.active is not active and (needs.lora_B or needs.gate):
            S = _packed(S, operands, active)
        dA, dB, dgate = weight_gradients(dy, x, S, T, known, active, needs)
        if on is not None:
            # Zeroed once more: 0 times infinity in x or dy is NaN.
            dA, dB, dgate = (None if value is None else zero_inactive(value, on) for value in (dA, dB, dgate))
        return Gradients(dx, dA, dB, dgate)

    def sample_rows(self, x: Tensor, m: int, seed: int, seed_offset: Tensor | None) -> Tensor:
        """Return the rows by PyTorch's indexing."""
        from slora.ops.gate_probe import sampled_rows

        return x[sampled_rows(x.shape[0], m, seed if seed_offset is None else seed + seed_offset, x.device)]

    def gate_probe(
        self, dy: Tensor, x: Tensor, operands: LoRAOperands, blocks: Sequence[int] | None, seed: int,
        seed_offset: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Return `dgate_i = c * <S_i, T_i>` over the sampled rows."""
        if x.shape[0] < dy.shape[0]:
            dy = self.sample_rows(dy, x.shape[0], seed, seed_offset)
        wide = torch.promote_types(dy.dtype, torch.float32)
        A, B, r = operands.lora_A, operands.lora_B, operands.r
        wanted = range(operands.blocks) if blocks is None else blocks
        S = (x @ _stacked(A, wanted).T).view(len(x), len(wanted), r)
        T = _times_B(dy, B, wanted).view(len(x), len(wanted), r)
        dgate = (S.to(wide) * T.to(wide)).sum((0, 2)).mul_(operands.scaling)
        if blocks is None:
            dgate = dgate * (operands.gate < operands.threshold)
        return scatter_blocks(dgate, operands.blocks, wanted)


EAGER = Eager()


def _of_all_blocks(
    dy: Tensor, x: Tensor | None, S: Tensor, weight: Tensor, operands: LoRAOperands, needs: Needs
) -> Gradients:
    """The backward where every block is active and there is no dropout, the usual case, in as few calls as possible."""
    A, B, c, blocks = operands.lora_A, operands.lora_B, operands.scaling, operands.blocks
    dx = dA = dB = dgate = None
    if needs.x or needs.lora_A:
        if blocks == 1:
            A, T = A[0], dy @ B[0]
        else:
            A = A.flatten(0, 1)
            T = torch.bmm(_by_block(dy, blocks), B).transpose(0, 1).reshape(dy.shape[0], A.shape[0])
        if needs.x:
            dx = (dy @ weight).addmm_(T, A, alpha=c)
        if needs.lora_A:
            assert x is not None
            dA = _scaled_product(T.t(), x, A, c).view_as(operands.lora_A)
    if needs.lora_B or needs.gate:
        if blocks == 1:
            dB = _outer(dy, S, B[0], c)[None]
        else:
            dB = torch.baddbmm(B, _by_block(dy, blocks).mT, _by_block(S, blocks), beta=0, alpha=c)
        if needs.gate:
            dgate = _inner_products(dB, B)
    return Gradients(dx, dA, dB if needs.lora_B else None, dgate)


def weight_gradients(
    dy: Tensor, x: Tensor | None, S: Tensor, T: Tensor | None, operands: LoRAOperands, active: Sequence[int],
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of A, B and the gates from the S and T of the `active` blocks and the x that went into S."""
    A, B, c = operands.lora_A, operands.lora_B, operands.factor
    dA = dB = dgate = None
    if needs.lora_A:
        assert x is not None
        assert T is not None
        dA = _scaled_product(T.t(), x, _stacked(A, active), c).view(len(active), *A.shape[1:])
    if needs.lora_B or needs.gate:
        dB = _transposed_times_S(dy, S, B, active, c)
        if needs.gate:
            dgate = _inner_products(dB, select_blocks(B, active))
        dB = dB if needs.lora_B else None
    if len(active) != len(A):
        dA, dB, dgate = (None if value is None else scatter_blocks(value, len(A), active) for value in (dA, dB, dgate))
    return dA, dB, dgate


def base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `F.linear(x, weight, bias)` with the rounding that it has where `weight` is trainable.

    If the rows are not contiguous, PyTorch multiplies a frozen weight batch by batch, which rounds differently: only
    to freeze a model would change its output.
    """
    try:
        if x.dim() <= 2 or (bias is not None and x.is_contiguous()):
            return F.linear(x, weight, bias)
        y = rows(x) @ weight.T
    except RuntimeError:
        check_input(x, weight)
        raise
    if bias is not None:
        y = y.add_(bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _known(operands: LoRAOperands) -> tuple[LoRAOperands, Sequence[int], Tensor | None]:
    """Return the operands, the blocks to compute, and None if the host knows the active blocks.

    Else every block is computed, with zeros for the inactive ones, and the third is a mask `[blocks]` of the active.
    """
    if operands.active is not None:
        return operands, operands.active, None
    on = operands.gate >= operands.threshold
    if _on_host(on):
        return operands, [i for i, flag in enumerate(on.tolist()) if flag], None
    A, B = zero_inactive(operands.lora_A, on), zero_inactive(operands.lora_B, on)
    return operands._replace(lora_A=A, lora_B=B), range(operands.blocks), on


def _on_host(on: Tensor) -> bool:
    return on.device.type == "cpu"


def _spread(S: Tensor, operands: LoRAOperands, active: Sequence[int]) -> Tensor:
    """`S` of the active blocks as `[M, packed * r]`, with zeros for the other packed blocks."""
    if len(active) == operands.packed:
        return S
    wide = S.new_zeros(len(S), operands.packed, operands.r)
    for k, i in enumerate(active):
        wide[:, i] = S[:, k * operands.r : (k + 1) * operands.r]
    return wide.flatten(1)


def _packed(S: Tensor, operands: LoRAOperands, active: Sequence[int]) -> Tensor:
    """The columns of the active blocks: the inverse of `_spread`."""
    if len(active) == operands.packed:
        return S
    return torch.cat([S[:, i * operands.r : (i + 1) * operands.r] for i in active] or [S[:, :0]], 1)


def _mask(operands: LoRAOperands, like: Tensor) -> Tensor:
    """The dropout mask of zeros and ones, `[M, K]`, in the dtype of `like [M, ...]`."""
    assert operands.seed is not None
    return counter.keep_mask(like.shape[0], operands.lora_A.shape[2], operands.dropout, operands.seed, like.dtype)


def _stacked(A: Tensor, active: Sequence[int]) -> Tensor:
    """The A matrices of the active blocks on top of each other, `[len(active) * r, K]`."""
    return select_blocks(A, active).reshape(len(active) * A.shape[1], A.shape[2])


def _batched(y: Tensor) -> bool:
    """Whether to compute all blocks of `y [M, N]` by one batched product: not in 16 bits on a CPU, where it takes twice
    as long."""
    return y.stride(1) == 1 and (y.is_cuda or y.element_size() > 2)


def _by_block(y: Tensor, blocks: int) -> Tensor:
    """`y [M, blocks * n]` as `[blocks, M, n]`, a view."""
    return y.view(y.shape[0], blocks, y.shape[1] // blocks).transpose(0, 1)


def add_update(y: Tensor, S: Tensor, B: Tensor, active: Sequence[int], c: float) -> None:
    """Add `c S_i B_i.T` to the columns of each active block of `y [M, N]`, in place."""
    if B.shape[0] == 1:
        y.addmm_(S, B[0].t(), alpha=c)
    elif len(active) == B.shape[0] and _batched(y):
        _by_block(y, B.shape[0]).baddbmm_(_by_block(S, B.shape[0]), B.mT, alpha=c)
    else:
        for i, y_i, S_i in zip(active, block_columns(y, B.shape[1], active), S.chunk(len(active), 1), strict=True):
            y_i.addmm_(S_i, B[i].T, alpha=c)


def _times_B(dy: Tensor, B: Tensor, active: Sequence[int]) -> Tensor:
    """Return `T [M, len(active) * r]`: the columns of each active block of `dy [M, N]`, times B_i."""
    if not active:
        return dy.new_empty(dy.shape[0], 0)
    parts = [dy_i @ B[i] for i, dy_i in zip(active, block_columns(dy, B.shape[1], active), strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _transposed_times_S(dy: Tensor, S: Tensor, B: Tensor, active: Sequence[int], c: float) -> Tensor:
    """Return `[len(active), n, r]`: c times the transposed columns of each active block of `dy [M, N]`, times S_i."""
    if not active:
        return B.new_empty(0, *B.shape[1:])
    triples = zip(active, block_columns(dy, B.shape[1], active), S.chunk(len(active), 1), strict=True)
    return torch.stack([_outer(dy_i, S_i, B[i], c) for i, dy_i, S_i in triples])


def _outer(dy: Tensor, S: Tensor, like: Tensor, c: float) -> Tensor:
    """Return `c dy.T S`, of the shape of `like [n, r]`."""
    # Which operand is transposed changes nothing but the time: on CPU the 16-bit GEMM wants the short side
    # as rows (0.65 ms against 1.08 at 3152 x 1536, r = 16), the fp32 one as columns (0.91 against 1.56).
    if dy.element_size() == 2:
        return _scaled_product(S.T, dy, like.T, c).T
    return _scaled_product(dy.t(), S, like, c)


def _scaled_product(a: Tensor, b: Tensor, like: Tensor, c: float) -> Tensor:
    """Return `c a b`, rounded once; `like` has its shape and is not read."""
    return torch.addmm(like, a, b, beta=0, alpha=c)


def _inner_products(dB: Tensor, B: Tensor) -> Tensor:
    """Return `<dB_i, B_i>` of each block, in fp32 at least."""
    dB = dB.float() if dB.element_size() == 2 else dB
    return (dB * B).sum((1, 2))
