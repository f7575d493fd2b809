"""The operator in Triton kernels and cuBLAS calls: its forms, and which of them runs.

| form | y | dx |
|---|---|---|
| `fused` | S inside the main loop of the base product | T inside the main loop |
| `split` | `fused` on the first column tile of each block, `precomputed` on the others | likewise |
| `precomputed` | S by a skinny product, then base product and update in one kernel | T likewise |
| `cublas_after` | S by a skinny product, base product by cuBLAS, `addmm_` of the update | T likewise |
| `cublas_before` | S by a skinny product, the update, the base product added to it by cuBLAS | T likewise |

All of them leave the same S and T, so that forward and backward may take different ones. dA, dB and the gates'
gradients are one pass over x and dy (`one_pass`), or cuBLAS products (`cublas`). Which form is the fastest is measured
(`autotune`), for eager mode, where the host knows the active blocks, and for graphs, where only the device does, apart.

`Forward`, `InputGradient` and `WeightGradients` are the three operations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slora.ops.backends import Gradients, Needs, autotune, eager
from slora.ops.layout import fp32_gate, rows, select_blocks, zero_inactive
from slora.ops.operands import LoRAOperands

# As `kernels/packed.py` and `kernels/configs.py` have them, which import Triton.
MAX_BLOCKS, MAX_RANK = 64, 256
Key = tuple[Any, ...]


class Form(NamedTuple):
    """One way to compute an operation."""

    name: str
    tiles: tuple[Any, ...] = ()
    """Tile sizes of its kernels."""

    def __str__(self) -> str:
        return " ".join([self.name, *map(str, self.tiles)])


class Triton:
    """See the head of this file."""

    name = "triton"

    def supports(self, x: Tensor, operands: LoRAOperands | None) -> bool:
        """bf16 and fp16 (in the interpreter also fp32); K and n that are multiples of 8; at most 64 blocks of rank 256;
        not without rows or active blocks. Without operands, to sample rows, any x."""
        if operands is None:
            return x.numel() > 0
        if x.dtype not in (torch.bfloat16, torch.float16) and (x.is_cuda or x.dtype != torch.float32):
            return False
        K, n = operands.lora_A.shape[2], operands.n
        fits = operands.blocks <= MAX_BLOCKS and 0 < operands.r <= MAX_RANK and operands.packed > 0
        return fits and K > 0 and n > 0 and K % 8 == n % 8 == 0 and x.numel() > 0

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, operands: LoRAOperands) -> tuple[Tensor, Tensor]:
        """Return `(y [..., N], S [M, packed * r])`."""
        from slora.kernels import launch

        r, operands = operands.r, _as_read(operands)
        y, S = _run(Forward(launch.aligned(rows(x)), launch.aligned(weight), bias, operands))
        if operands.r != r:
            S = S.view(len(S), -1, operands.r)[:, :, :r].flatten(1)
        return y.view(*x.shape[:-1], weight.shape[0]), S

    def backward(
        self, dy: Tensor, x: Tensor | None, S: Tensor, weight: Tensor, operands: LoRAOperands, needs: Needs
    ) -> Gradients:
        """Return the gradients."""
        from slora.kernels import launch, skinny

        r, operands = operands.r, _as_read(operands)
        dy = launch.aligned(dy)
        dx = T = None
        if needs.x:
            dx, T = _run(InputGradient(dy, launch.aligned(weight), None, operands))
        elif needs.lora_A:
            T = skinny.products(dy, operands, forward=False)
        if not any(needs[1:]):
            return Gradients(dx, None, None, None)
        if operands.r != r and (needs.lora_B or needs.gate):
            S = F.pad(S.view(len(S), -1, r), (0, operands.r - r)).flatten(1)
        x = launch.aligned(x) if x is not None and needs.lora_A else None
        dA, dB, dgate = _run(WeightGradients(x, dy, S, T, operands, needs))
        if operands.r != r:
            dA, dB = dA if dA is None else dA[:, :r], dB if dB is None else dB[:, :, :r].contiguous()
        return Gradients(dx, dA, dB, dgate)

    def sample_rows(self, x: Tensor, m: int, seed: int, seed_offset: Tensor | None) -> Tensor:
        """Return the rows by a kernel that draws their numbers: PyTorch's indexing without its dozen small launches."""
        if x.stride(1) != 1:
            return eager.EAGER.sample_rows(x, m, seed, seed_offset)
        from slora.kernels import gate_probe

        return gate_probe.sample_rows(x, m, seed, seed_offset)

    def gate_probe(
        self, dy: Tensor, x: Tensor, operands: LoRAOperands, blocks: Sequence[int] | None, seed: int,
        seed_offset: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Return `dgate` by a kernel that finds the inactive blocks and the rows of dy by itself."""
        from slora.kernels import gate_probe, launch

        return gate_probe.gate_probe(launch.aligned(dy), launch.aligned(x), _as_read(operands), seed, seed_offset)


def _as_read(operands: LoRAOperands) -> LoRAOperands:
    """As the kernels read them: contiguous matrices of a rank that is a multiple of 4, gates in fp32."""
    gate, threshold = fp32_gate(operands.gate, operands.threshold)
    A, B = operands.lora_A, operands.lora_B
    if missing := -operands.r % 4:
        A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
    # Those of a flat buffer, as FSDP keeps them, may start anywhere.
    A, B = (t if t.data_ptr() % 16 == 0 else t.clone() for t in (A.contiguous(), B.contiguous()))
    return operands._replace(lora_A=A, lora_B=B, gate=gate, threshold=threshold)


@dataclasses.dataclass(frozen=True, slots=True)
class Linear:
    """`(y [M, N], S [M, packed * r])` of x, or `(dx [M, K], T [M, packed * r])` of dy."""

    rows: Tensor
    """x or dy."""
    W: Tensor
    bias: Tensor | None
    operands: LoRAOperands
    forward: ClassVar[bool]

    @property
    def key(self) -> Key:
        """What a choice of form depends on, but for the number of rows and the device."""
        name, options = ("forward", [self.bias is not None]) if self.forward else ("input gradient", [])
        return _key(name, self.rows, self.operands, *options)

    def forms(self) -> list[Form]:
        """Return the candidates, the best guess among our kernels first."""
        from slora.kernels import configs, launch

        operands, arch = self.operands, launch.arch(self.rows.device)
        blocks, r, n = operands.blocks, operands.r, operands.n
        columns, width = (n, r) if self.forward else (self.W.shape[1], operands.packed * r)
        looped, masked = (not self.forward and flag for flag in (blocks > 1, operands.dropout > 0.0))

        def tiles(form: Any, R: int) -> list[Any]:
            # Those that would compute more than an eighth in vain come last.
            return sorted(configs.gemm(arch, form, R), key=lambda tile: 8 * (-columns % tile.BN) > columns)

        fused, others = [], tiles("masked" if masked else "precomputed", configs.padded(width))
        if r <= configs.MAX_FUSED_RANK and not operands.dropout:
            fused = tiles("looped" if looped else "fused", configs.padded(r))
            if looped and arch >= 90:
                # Tiles of dy that TMA brings must not reach over the end of a block.
                fused = [tile for tile in fused if n % tile.BK == 0]
        pairs = [(fused[0], tile) for tile in others] + [(tile, others[0]) for tile in fused[1:]] if fused else []
        forms = [
            *(Form("fused", (tile,)) for tile in fused),
            *(Form("split", pair) for pair in pairs if columns > pair[0].BN),
            *(Form("precomputed", (tile,)) for tile in others),
        ]
        # With a mask on dx, cuBLAS would need the update in memory.
        if _known_or_single(operands) and not masked:
            forms.append(Form("cublas_after"))
            if blocks == 1 or not self.forward:
                forms.append(Form("cublas_before"))
        return forms

    def compute(self, form: Form) -> tuple[Tensor, Tensor]:
        """Return the result by one of `forms`."""
        from slora.kernels import linear, skinny

        rows, W, bias, operands, forward = self.rows, self.W, self.bias, self.operands, self.forward
        if form.name == "fused":
            return linear.fused(rows, W, bias, operands, *form.tiles, forward=forward)
        factor = operands.lora_B if forward else select_blocks(*_zeroed(operands.lora_A, operands)).view(-1, W.shape[1])
        if form.name == "split":
            first, others = form.tiles
            out, low = linear.fused(rows, W, bias, operands, first, forward=forward, first_tile=True)
            linear.precomputed(rows, W, bias, low, factor, operands, others, forward=forward, out=out, begin=first.BN)
            return out, low
        low = skinny.products(rows, operands, forward=forward)
        if form.name == "precomputed":
            return linear.precomputed(rows, W, bias, low, factor, operands, *form.tiles, forward=forward), low
        # cuBLAS has one update of dx for all packed blocks.
        (B, active), right = (_zeroed(factor, operands), W.T) if forward else ((factor.T[None], (0,)), W)
        if form.name == "cublas_after":
            out = F.linear(rows, right.T, bias)
            eager.add_update(out, low, B, active, operands.factor)
            return out, low
        # Rounded once more than in `fused`, but before the base product is added: by a unit of the update and the bias.
        start, beta = (B[0, 0, 0], 0) if bias is None else (bias, 1)
        return torch.addmm(start, low, B[0].T, beta=beta, alpha=operands.factor).addmm_(rows, right), low


class Forward(Linear):
    """y and S of x."""

    forward = True


class InputGradient(Linear):
    """dx and T of dy, without a bias."""

    forward = False


class WeightGradients(NamedTuple):
    """`(dA, dB, dgate)`, None for each that is not needed."""

    x: Tensor | None
    rows: Tensor
    """dy."""
    S: Tensor
    T: Tensor | None
    operands: LoRAOperands
    needs: Needs

    @property
    def key(self) -> Key:
        """As that of `Linear`."""
        return _key("weight gradients", self.rows, self.operands, *self.needs[1:])

    def forms(self) -> list[Form]:
        """As those of `Linear`."""
        from slora.kernels import configs, launch, weight_gradients

        operands = self.operands
        low = weight_gradients.low_width(operands.packed * operands.r if self.needs.lora_A else operands.r)
        tiles = configs.weight_gradients(launch.arch(self.rows.device), low)
        cublas = [Form("cublas")] * (_known_or_single(operands) and not operands.dropout)
        return [Form("one_pass", (tile,)) for tile in tiles] + cublas

    def compute(self, form: Form) -> tuple[Tensor | None, ...]:
        """Return the result by one of `forms`."""
        from slora.kernels import weight_gradients

        x, dy, S, T, operands, needs = self
        if form.name == "one_pass":
            return weight_gradients.weight_gradients(x, dy, S, T, operands, needs[1:], *form.tiles)
        B, active = _zeroed(operands.lora_B, operands)
        found = eager.weight_gradients(dy, x, S, T, operands._replace(lora_B=B), active, needs)
        return tuple(None if value is None else _zeroed(value, operands)[0] for value in found)


Operation = Linear | WeightGradients


def _known_or_single(operands: LoRAOperands) -> bool:
    """Whether forms of cuBLAS are candidates. Where only the device knows the active blocks they compute every one.

    Of several, a choice made while all are active would then cost every block's update after most have been switched
    off; of one there is no more to lose than that update.
    """
    return operands.active is not None or operands.blocks == 1


def _zeroed(values: Tensor, operands: LoRAOperands) -> tuple[Tensor, Sequence[int]]:
    """`values [blocks, ...]`, with zeros for the inactive ones where only the device knows those, and the blocks that
    cuBLAS then computes."""
    if operands.active is not None:
        return values, operands.active
    return zero_inactive(values, operands.gate >= operands.threshold), range(operands.blocks)


_FIELDS = ("operation", "K", "N", "blocks", "packed", "r", "dtype", "dropout", "host_known", "options")


def _key(operation: str, rows: Tensor, operands: LoRAOperands, *options: bool) -> Key:
    (blocks, r, K), active = operands.lora_A.shape, operands.active
    return (operation, K, blocks * operands.n, blocks, operands.packed, r, rows.dtype, operands.dropout > 0,
            active is not None, options)  # fmt: skip


def _words(key: Key) -> str:
    """The key for people, as the file of choices has it."""
    return " ".join(f"{name}={value}" for name, value in zip(_FIELDS, key, strict=False))


# The form of every call seen, by key, rows, device and setting: a layer asks for it three times per step, and neither
# the candidates nor the file of choices should be looked at again.
_chosen: dict[Key, Form] = {}


def _run(operation: Operation) -> Any:
    return operation.compute(_form(operation))


def _form(operation: Operation) -> Form:
    """The first of our kernels where the backend is pinned to them, else the fastest form."""
    from slora.ops.dispatch import setting

    pinned = setting() == "triton"
    rows, key = operation.rows, operation.key
    place = key, autotune.bucket(rows.shape[0]), rows.device, pinned or torch.are_deterministic_algorithms_enabled()
    form = _chosen.get(place)
    if form is None:
        candidates = {str(form): form for form in operation.forms()}
        name: str | None = next(iter(candidates))
        if not pinned:
            calls = {name: functools.partial(operation.compute, form) for name, form in candidates.items()}
            name = autotune.choose(_words(key), rows.shape[0], rows.device, calls)
        if name is None:
            return next(iter(candidates.values()))
        form = _chosen[place] = candidates[name]
    return form
