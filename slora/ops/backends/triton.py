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

`Forward`, `InputGradient` and `WeightGradients` are the three operations: `forms()` lists the candidates, the best
guess first, and `compute(form)` is the result by one of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from slora.ops.backends import Gradients, Needs, autotune, eager
from slora.ops.layout import chosen, fp32_gate, masked, rows
from slora.ops.operands import LoRAOperands

# As `kernels/packed.py` and `kernels/configs.py` have them, which import Triton.
MAX_BLOCKS, MAX_RANK = 64, 256


class Form(NamedTuple):
    """One way to compute an operation."""

    name: str
    tiles: tuple[Any, ...] = ()
    """Tile sizes of its kernels."""

    def __str__(self) -> str:
        return " ".join([self.name, *map(str, self.tiles)])


class Operation(Protocol):
    """Something to compute in one of several forms."""

    @property
    def rows(self) -> Tensor:
        """x or dy."""
        ...

    @property
    def key(self) -> tuple[Any, ...]:
        """What a choice of form depends on, but for the number of rows and the device."""
        ...

    def forms(self) -> list[Form]:
        """Return the candidates, the best guess among our kernels first."""
        ...

    def compute(self, form: Form) -> Any:
        """Return the result."""
        ...


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
            dx, T = _run(InputGradient(dy, launch.aligned(weight), operands))
        elif needs.lora_A:
            T = skinny.T(dy, operands)
        if not any(needs[1:]):
            return Gradients(dx, None, None, None)
        if operands.r != r and (needs.lora_B or needs.gate):
            S = F.pad(S.view(len(S), -1, r), (0, operands.r - r)).flatten(1)
        x = launch.aligned(x) if x is not None and needs.lora_A else None
        dA, dB, dgate = _run(WeightGradients(x, dy, S, T, operands, needs))
        if operands.r != r:
            dA, dB = dA if dA is None else dA[:, :r], dB if dB is None else dB[:, :, :r].contiguous()
        return Gradients(dx, dA, dB, dgate)

    def sample_rows(self, x: Tensor, m: int, seed: int, shift: Tensor | None) -> Tensor:
        """Return the rows by a kernel that draws their numbers: PyTorch's indexing without its dozen small launches."""
        if x.stride(1) != 1:
            return eager.EAGER.sample_rows(x, m, seed, shift)
        from slora.kernels import gate_probe

        return gate_probe.sample_rows(x, m, seed, shift)

    def gate_probe(
        self, dy: Tensor, x: Tensor, operands: LoRAOperands, blocks: Sequence[int] | None, seed: int,
        shift: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Return `dgate` by a kernel that finds the inactive blocks and the rows of dy by itself."""
        from slora.kernels import gate_probe, launch

        return gate_probe.gate_probe(launch.aligned(dy), launch.aligned(x), _as_read(operands), seed, shift)


def _as_read(operands: LoRAOperands) -> LoRAOperands:
    """As the kernels read them: contiguous matrices of a rank that is a multiple of 4, gates in fp32."""
    gate, threshold = fp32_gate(operands.gate, operands.threshold)
    A, B = operands.lora_A, operands.lora_B
    if missing := -operands.r % 4:
        A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
    # Those of a flat buffer, as FSDP keeps them, may start anywhere.
    A, B = (t if t.data_ptr() % 16 == 0 else t.clone() for t in (A.contiguous(), B.contiguous()))
    return operands._replace(lora_A=A, lora_B=B, gate=gate, threshold=threshold)


class Forward(NamedTuple):
    """`(y [M, N], S [M, packed * r])`."""

    x: Tensor
    W: Tensor
    bias: Tensor | None
    operands: LoRAOperands

    @property
    def rows(self) -> Tensor:
        """x."""
        return self.x

    @property
    def key(self) -> tuple[Any, ...]:
        """See `Operation`."""
        return _key("forward", self.x, self.operands, self.bias is not None)

    def forms(self) -> list[Form]:
        """See `Operation`."""
        forms = _kernel_forms(self.x, self.operands, self.operands.r, self.operands.n, "precomputed")
        if _known_or_single(self.operands):
            forms.append(Form("cublas_after"))
            if self.operands.blocks == 1:
                forms.append(Form("cublas_before"))
        return forms

    def compute(self, form: Form) -> tuple[Tensor, Tensor]:
        """See `Operation`."""
        from slora.kernels import linear_forward, linear_precomputed, skinny

        x, W, bias, operands = self
        if form.name == "fused":
            return linear_forward.fused(x, W, bias, operands, *form.tiles)
        if form.name == "split":
            first, others = form.tiles
            y, S = linear_forward.fused(x, W, bias, operands, first, first_tile=True)
            return linear_precomputed.forward(x, W, bias, S, operands, others, y, first.BN), S
        S = skinny.S(x, operands)
        if form.name == "precomputed":
            return linear_precomputed.forward(x, W, bias, S, operands, *form.tiles), S
        active = range(operands.blocks) if operands.active is None else operands.active
        B, c = operands.lora_B if operands.active is not None else _present(operands.lora_B, operands), operands.factor
        if form.name == "cublas_after":
            y = F.linear(x, W, bias)
            eager._add_update(y, S, B, active, c)
            return y, S
        # Rounded once more than in `fused`, but before the base product is added: by a unit of the update and the bias.
        first, beta = (B[0, 0, 0], 0) if bias is None else (bias, 1)
        return torch.addmm(first, S, B[0].T, beta=beta, alpha=c).addmm_(x, W.T), S


class InputGradient(NamedTuple):
    """`(dx [M, K], T [M, packed * r])`."""

    dy: Tensor
    W: Tensor
    operands: LoRAOperands

    @property
    def rows(self) -> Tensor:
        """dy."""
        return self.dy

    @property
    def key(self) -> tuple[Any, ...]:
        """See `Operation`."""
        return _key("input gradient", self.dy, self.operands)

    def forms(self) -> list[Form]:
        """See `Operation`."""
        operands = self.operands
        precomputed = "masked" if operands.dropout else "precomputed"
        forms = _kernel_forms(
            self.dy, operands, operands.packed * operands.r, self.W.shape[1], precomputed, steps_of=operands.n
        )
        # cuBLAS would need the update in memory, to mask it.
        if _known_or_single(operands) and not operands.dropout:
            forms += [Form("cublas_after"), Form("cublas_before")]
        return forms

    def compute(self, form: Form) -> tuple[Tensor, Tensor]:
        """See `Operation`."""
        from slora.kernels import linear_backward, linear_precomputed, skinny

        dy, W, operands = self
        if form.name == "fused":
            return linear_backward.fused(dy, W, operands, *form.tiles)
        A = _present(operands.lora_A, operands).view(-1, W.shape[1])
        if form.name == "split":
            first, others = form.tiles
            dx, T = linear_backward.fused(dy, W, operands, first, first_tile=True)
            return linear_precomputed.backward(dy, W, T, A, operands, others, dx, first.BN), T
        T = skinny.T(dy, operands)
        if form.name == "precomputed":
            return linear_precomputed.backward(dy, W, T, A, operands, *form.tiles), T
        if form.name == "cublas_after":
            return (dy @ W).addmm_(T, A, alpha=operands.scaling), T
        return torch.addmm(A[0, 0], T, A, beta=0, alpha=operands.scaling).addmm_(dy, W), T


class WeightGradients(NamedTuple):
    """`(dA, dB, dgate)`, None for each that is not needed."""

    x: Tensor | None
    dy: Tensor
    S: Tensor
    T: Tensor | None
    operands: LoRAOperands
    needs: Needs

    @property
    def rows(self) -> Tensor:
        """dy."""
        return self.dy

    @property
    def key(self) -> tuple[Any, ...]:
        """See `Operation`."""
        return _key("weight gradients", self.dy, self.operands, *self.needs[1:])

    def forms(self) -> list[Form]:
        """See `Operation`."""
        from slora.kernels import configs, launch, weight_gradients

        operands = self.operands
        low = weight_gradients.low_width(operands.packed * operands.r if self.needs.lora_A else operands.r)
        tiles = configs.weight_gradients(launch.arch(self.dy.device), low)
        cublas = [Form("cublas")] * (_known_or_single(operands) and not operands.dropout)
        return [Form("one_pass", (tile,)) for tile in tiles] + cublas

    def compute(self, form: Form) -> tuple[Tensor | None, ...]:
        """See `Operation`."""
        from slora.kernels import weight_gradients

        x, dy, S, T, operands, needs = self
        if form.name == "one_pass":
            return weight_gradients.weight_gradients(x, dy, S, T, operands, needs[1:], *form.tiles)
        active = range(operands.blocks) if operands.active is None else operands.active
        found = eager.weight_gradients(dy, x, S, T, operands, active, needs)
        if operands.active is None:
            on = operands.gate >= operands.threshold
            return tuple(None if value is None else masked(value, on) for value in found)
        return found


def _kernel_forms(
    x: Tensor, operands: LoRAOperands, width: int, columns: int, precomputed: Any, steps_of: int | None = None
) -> list[Form]:
    """The forms of our kernels for y or dx: `columns` of it per block, `width` of S or T in an update.

    `steps_of`: columns of dy per block, whose ends TMA must not reach over.
    """
    from slora.kernels import configs, launch

    arch, r = launch.arch(x.device), operands.r

    def tiles(form: Any, R: int) -> list[Any]:
        # Those that would compute more than an eighth in vain come last.
        return sorted(configs.gemm(arch, form, R), key=lambda tile: 8 * (-columns % tile.BN) > columns)

    fused, others = [], tiles(precomputed, configs.padded(width))
    if r <= configs.MAX_FUSED_RANK and not operands.dropout:
        whole_steps = steps_of is None or operands.blocks == 1 or arch < 90
        fused = [tile for tile in tiles("fused", configs.padded(r)) if whole_steps or steps_of % tile.BK == 0]
    pairs = [(fused[0], tile) for tile in others] + [(tile, others[0]) for tile in fused[1:]] if fused else []
    return [
        *(Form("fused", (tile,)) for tile in fused),
        *(Form("split", pair) for pair in pairs if columns > pair[0].BN),
        *(Form("precomputed", (tile,)) for tile in others),
    ]


def _known_or_single(operands: LoRAOperands) -> bool:
    """Whether forms of cuBLAS are candidates. Where only the device knows the active blocks they compute every one.

    Of several, a choice made while all are active would then cost every block's update after most have been switched
    off; of one there is no more to lose than that update.
    """
    return operands.active is not None or operands.blocks == 1


def _present(matrices: Tensor, operands: LoRAOperands) -> Tensor:
    """The A or B of every packed block: the active ones, or all with zeros for the inactive ones."""
    if operands.active is not None:
        return chosen(matrices, operands.active)
    return masked(matrices, operands.gate >= operands.threshold)


def _key(operation: str, rows: Tensor, operands: LoRAOperands, *options: bool) -> tuple[Any, ...]:
    (blocks, r, K), active = operands.lora_A.shape, operands.active
    packed = blocks if active is None else len(active)
    return (operation, K, blocks * operands.n, blocks, packed, r, rows.dtype, operands.dropout > 0, active is not None,
            *options)  # fmt: skip


def _words(key: tuple[Any, ...]) -> str:
    """The key for people, as the file of choices has it."""
    operation, K, N, blocks, packed, r, dtype, dropout, host_known, *options = key
    flags = "dropout" * dropout, "host_known" * host_known, *("01"[there] for there in options)
    sizes = f"K={K} N={N} blocks={blocks} packed={packed} r={r}"
    return " ".join(filter(None, (operation, sizes, str(dtype).removeprefix("torch."), *flags)))


# The form of every call seen, by operation, rows, device and setting: a layer asks for it three times per step, and
# neither the candidates nor the file of choices should be looked at again.
_chosen: dict[tuple[Any, ...], Form] = {}


def _run(operation: Operation) -> Any:
    return operation.compute(_form(operation))


def _form(operation: Operation) -> Form:
    """The first of our kernels where the backend is pinned to them, else the fastest form."""
    from slora.ops.dispatch import setting

    pinned = setting() == "triton"
    rows, shape = operation.rows, operation.key
    place = shape, autotune.bucket(rows.shape[0]), rows.device, pinned or torch.are_deterministic_algorithms_enabled()
    form = _chosen.get(place)
    if form is None:
        candidates = operation.forms()
        form = candidates[0]
        if not pinned:
            calls = {str(candidate): functools.partial(operation.compute, candidate) for candidate in candidates}
            name = autotune.choose(_words(shape), rows.shape[0], rows.device, calls)
            if name is None:
                return form
            form = next(candidate for candidate in candidates if str(candidate) == name)
        _chosen[place] = form
    return form
