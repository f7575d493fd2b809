"""LoRA pairs as signs: of each matrix the largest values, their signs and one scale (ComPEFT, arXiv 2311.13171).

ComPEFT takes all LoRA values of an adapter as one vector (in its authors' code A and B as trained, nothing subtracted),
keeps the signs of the largest magnitudes, a share `density` of them, and multiplies them by one number: `alpha` times
the standard deviation of the vector. `alpha` is tuned on validation data.

Here each matrix of each block is treated alone, because in one vector the values of A, drawn at random and of another
size, would displace those of B. By default the scale needs no tuning: the update keeps its norm. And the pair may first
be replaced by another with the same product: a trained A is mostly its random start, so its magnitudes say little,
while those of the singular vectors of `B A` do.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

# 3 ** 5 = 243 values in a byte, 1.6 bits for each trit.
PER_BYTE = 5
_POWERS = 3 ** np.arange(PER_BYTE)


class Signs(NamedTuple):
    """A pair `A [r, K]`, `B [n, r]` with values -1, 0 and 1 (int8), and the factor on each of the two."""

    A: Tensor
    B: Tensor
    scale: float


def signs_of(A: Tensor, B: Tensor, density: float, scale: str | float) -> Signs:
    """Return the pair of signs for `A [r, K]` and `B [n, r]`, fp32.

    Of the given pair and the balanced one, the result is that whose signs are nearer to the direction of the update
    `B A`. The factor on both matrices is the root of that on the update:

        "norm"  ||s T_B T_A|| = ||B A||
        "fit"   the least ||s T_B T_A - B A||, which shrinks the update
        alpha   s = alpha^2 std(A) std(B)

    Args:
        density: share of the values that are not 0, above 0 up to 1; at least one value of a matrix is kept.
        scale: "norm", "fit" or ComPEFT's alpha.
    """
    pairs = [(A, B), balanced(A, B)]
    found = [(_signs(P, density), _signs(Q, density)) for P, Q in pairs]
    cosines = [_inner((A, B), T) / max(_inner(T, T), 1e-30) ** 0.5 for T in found]
    best = 0 if cosines[0] >= cosines[1] else 1
    T_A, T_B = found[best]
    size = _inner((T_A, T_B), (T_A, T_B))
    if size <= 0:
        # The signs of A and B are in different ranks, or the update is 0.
        factor = 0.0
    elif scale == "norm":
        factor = (_inner((A, B), (A, B)) / size) ** 0.5
    elif scale == "fit":
        factor = max(_inner((A, B), (T_A, T_B)), 0.0) / size
    else:
        P, Q = pairs[best]
        factor = float(scale) ** 2 * float(P.std(correction=0)) * float(Q.std(correction=0))
    # In fp32, as in the file.
    root = float(torch.tensor(factor**0.5, dtype=torch.float32))
    return Signs(T_A.to(torch.int8), T_B.to(torch.int8), root)


def balanced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pair `sqrt(S) V^T`, `U sqrt(S)` with the same product `B A = U S V^T` (its thin SVD)."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, S, Vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    root, left = S.sqrt(), A.shape[0] - len(S)
    # Where the rank is larger than the matrix, the remaining ranks are 0.
    return pad(root[:, None] * Vt @ Q_A.T, (0, 0, 0, left)), pad(Q_B @ U * root, (0, left))


def squared_error(A: Tensor, B: Tensor, signs: Signs) -> tuple[float, float]:
    """Return `||B A - B' A'||^2` and `||B A||^2`, by products of r x r matrices."""
    T = signs.scale * signs.A.float(), signs.scale * signs.B.float()
    size = _inner((A, B), (A, B))
    return max(0.0, size - 2 * _inner((A, B), T) + _inner(T, T)), size


def pack(trits: Tensor) -> bytes:
    """Return values -1, 0 and 1 as bytes: five in a byte, then Huffman-coded.

    The code makes zeros cheap: the result is within a few percent of the entropy, as are the Golomb codes of ComPEFT.
    """
    digits = trits.numpy().astype(np.uint8) + np.uint8(1)
    padded = np.concatenate([digits, np.zeros(-len(digits) % PER_BYTE, np.uint8)])
    values = (padded.reshape(-1, PER_BYTE) @ _POWERS).astype(np.uint8)
    coder = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(values.tobytes()) + coder.flush()


def unpack(packed: bytes, count: int) -> Tensor:
    """Return the `count` values that `pack` was given, int8.

    Raises:
        ValueError: `packed` does not hold that many.
    """
    size = -(-count // PER_BYTE)
    values = np.frombuffer(inflated(packed, size), np.uint8)
    if len(values) != size or (size and values.max() >= 3**PER_BYTE):
        raise ValueError(f"it does not hold {count} signs")
    digits = values[:, None] // _POWERS % 3
    return torch.from_numpy(digits.reshape(-1)[:count].astype(np.int8) - np.int8(1))


def inflated(packed: bytes, largest: int) -> bytes:
    """Return the content of a zlib stream of at most `largest` bytes.

    Raises:
        ValueError: it is damaged, or longer.
    """
    coder = zlib.decompressobj()
    try:
        # One byte more than asked for also consumes the check sum after the last.
        content = coder.decompress(packed, largest + 1)
    except (zlib.error, OverflowError) as error:
        raise ValueError(str(error)) from error
    if len(content) > largest or not coder.eof:
        raise ValueError(f"it is cut off, or holds more than {largest} bytes")
    return content


def _signs(matrix: Tensor, density: float) -> Tensor:
    """The signs of the `density` largest magnitudes, fp32, and 0 elsewhere."""
    values = matrix.reshape(-1)
    kept = values.abs().topk(max(1, round(density * len(values)))).indices
    return torch.zeros_like(values).index_copy(0, kept, values[kept].sign()).view_as(matrix)


def _inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """`<B A, B' A'>` of two pairs, without forming the products."""
    (A, B), (C, D) = one, other
    return float(((B.double().T @ D.double()) * (A.double() @ C.double().T)).sum())
