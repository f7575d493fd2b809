"""`Projection`: the product of an adapted layer, `x @ W.T + b` with the update of its active blocks.

In eager mode the host knows the active blocks (`slora.gates.cache`) and passes them to the operator (`slora.ops`).
Where a graph is recorded (torch.compile, export, CUDA graphs, torch.func) the gates on the device decide instead,
because other blocks may be active when the graph runs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_tracing
from torch.nn.parallel import DistributedDataParallel

from slora import ops
from slora.errors import StateError
from slora.gates.gated import Activity, is_current, version
from slora.layers.ddp import with_expected_parameters
from slora.layers.ranks import RankGated
from slora.layers.state import LORA_PARAMETERS
from slora.ops.backends.eager import base
from slora.ops.checks import check_operands, fits
from slora.ops.gate_probe import ProbeGates
from slora.ops.operands import LoRAOperands

OWN_BIAS: Any = object()
"""Stands for the layer's own bias where a call may pass another one or None."""
_on_device: ContextVar[bool] = ContextVar("slora_gates_on_device", default=False)


class Projection(RankGated):
    """A base weight `[N, K]` with a bias `[N]`, and the product with both and with the LoRA blocks."""

    weight_name: ClassVar[str] = "weight"
    bias_name: ClassVar[str] = "bias"

    lora_dropout: float
    probe_rows: int
    enabled: bool
    _seed: int
    """Seed of this layer; with `Activity.step` it draws the rows of the probe."""

    @property
    def base_weight(self) -> Tensor:
        """The frozen weight `[N, K]` that the blocks adapt."""
        weight: Tensor = getattr(self, self.weight_name)
        return weight

    @property
    def base_bias(self) -> Tensor | None:
        """The bias `[N]` that belongs to it, or None."""
        bias: Tensor | None = getattr(self, self.bias_name)
        return bias

    def project(self, x: Tensor, first: int = 0, count: int | None = None, bias: Any = OWN_BIAS) -> Tensor:
        """Return `x @ W.T + b` with the update of the active blocks; `x [..., K]`, result `[..., N]`.

        Args:
            x: the input.
            first, count: compute only the outputs of blocks `first, ..., first + count - 1`; attention needs that
                where query, key and value come from different inputs. All blocks by default.
            bias: `[N]` or None, in place of the layer's own.
        """
        x, weight, own_bias = self._in_autocast_dtype(x)
        if bias is OWN_BIAS:
            bias = own_bias
        elif bias is not None and not x.is_meta and torch.is_autocast_enabled(x.device.type):
            bias = bias.to(weight.dtype)
        blocks = None if count is None or (first, count) == (0, self.blocks) else slice(first, first + count)
        if blocks is not None:
            rows = slice(*(i * weight.shape[0] // self.blocks for i in (blocks.start, blocks.stop)))
            weight, bias = weight[rows], None if bias is None else bias[rows]
        if self.merged or not self.enabled:
            return base(x if self.merged else with_expected_parameters(self, x, active=False), weight, bias)
        if torch.compiler.is_compiling() or _capturing(x) or _are_functorch_transforms_active() or _is_tracing():
            return self._project_on_device(x, weight, bias, blocks)
        activity = self._activity
        if activity is None or not is_current(self):
            activity = self.activity()
        probes = activity.probe and torch.is_grad_enabled() and self.gate.requires_grad
        if DistributedDataParallel._active_ddp_module is not None or self.gate_cache.ddp is not None:
            x = with_expected_parameters(self, x, activity.active != ())
        if not (activity.active or probes):
            return base(x, weight, bias)
        operands = self._operands(activity, blocks, x, weight, bias)
        y = ops.apply(x, weight, bias, operands) if operands.active else base(x, weight, bias)
        inactive = activity.inactive if blocks is None else _within(activity.inactive, blocks)
        return self._with_probe(y, x, operands, activity, inactive, first) if probes and inactive else y

    def _project_on_device(self, x: Tensor, weight: Tensor, bias: Tensor | None, blocks: slice | None) -> Tensor:
        """`project` where a graph is recorded or calls are transformed: the gates on the device decide."""
        if self.released:
            return base(x, weight, bias)
        if ops.needs_reference():
            learns = self.inactive != "frozen" and (torch.compiler.is_compiling() or not _is_tracing())
            return ops.apply_reference(x, weight, bias, self._all_operands(blocks, None), every_gate=learns)
        # Frozen blocks that are off stay off, so that this call can leave them out.
        active = () if not torch.compiler.is_compiling() and self._off_for_good() else None
        operands = self._all_operands(blocks, active)
        if not torch.compiler.is_compiling():
            x = with_expected_parameters(self, x, active is None)
        y = base(x, weight, bias) if active == () else ops.apply(x, weight, bias, self._with_seed(operands, x))
        # An exported program is for inference, and the rows of a probe would fix the number of rows of its inputs.
        learns = torch.is_grad_enabled() and self.gate.requires_grad and not _exporting()
        if self.inactive != "frozen" and learns:
            y = self._with_probe(y, x, operands, None, None, 0 if blocks is None else blocks.start)
        return y

    def _operands(
        self, activity: Activity, blocks: slice | None, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> LoRAOperands:
        """The operands of one call, checked; those of the last call where nothing has changed since."""
        ready = self._ready if blocks is None else None
        if (
            ready is not None
            and ready[0] == activity.active
            and ready[1] == self._operands_key(weight, bias)
            and fits(x, weight)
        ):
            operands: LoRAOperands = ready[2]
            return self._with_seed(operands, x) if operands.dropout else operands
        active = activity.active if blocks is None else _within(activity.active, blocks)
        if self.released and active:
            raise StateError(
                "a gate was raised above the threshold after its LoRA matrices were freed by inactive='frozen'; "
                "lower it again, or train with inactive='probe'"
            )
        operands = self._all_operands(blocks, active)
        if active:
            operands = self._with_seed(operands, x)
            # A gate that FSDP has rounded to 16 bits for the forward may be on the other side of the threshold, so that
            # it must not be compared with the blocks that the host knows.
            rounded = self._sharded_gate is not None and operands.gate.dtype != self._sharded_gate.dtype
            check_operands(x, weight, bias, operands._replace(active=None) if rounded else operands)
            # Where there are rank gates, B is another tensor at every call.
            if blocks is None and weight.grad_fn is None and self.rank_gate is None:
                self._ready = active, self._operands_key(weight, bias), operands
        return operands

    def _operands_key(self, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        """Identity, shape, dtype and device of the operands' tensors: assigning `.data` changes all but the first."""
        lora_A, lora_B, gate = map(self._parameters.get, LORA_PARAMETERS)
        if lora_A is None or lora_B is None or gate is None:
            # A parametrization computes it, or a replica of DataParallel holds it: another tensor at every call.
            return (object(),)
        of_bias = () if bias is None else (id(bias), bias.shape, bias.dtype, bias.device)
        return (
            id(lora_A), lora_A.shape, lora_A.dtype, lora_A.device,
            id(lora_B), lora_B.shape, lora_B.dtype, lora_B.device,
            id(gate), gate.shape, gate.dtype, gate.device,
            id(weight), weight.shape, weight.dtype, *of_bias,
        )  # fmt: skip

    def _all_operands(self, blocks: slice | None, active: Sequence[int] | None) -> LoRAOperands:
        """The operands of `blocks`, or of all, not checked and without a seed."""
        lora_A: Tensor = self.lora_A
        lora_B: Tensor = self.effective_B
        gate: Tensor = self.gate
        if blocks is not None:
            lora_A, lora_B, gate = lora_A[blocks], lora_B[blocks], gate[blocks]
        dropout = self.lora_dropout if self.training else 0.0
        return LoRAOperands(lora_A, lora_B, gate, self.threshold, self.scaling, active, dropout)

    def _with_seed(self, operands: LoRAOperands, x: Tensor) -> LoRAOperands:
        """The operands with a new seed of the dropout mask, if there is dropout."""
        if not operands.dropout:
            return operands
        return operands._replace(seed=torch.randint(2**62, (), device=x.device))

    def _off_for_good(self) -> bool:
        """Whether no block is active and none will be, without reading the gates, which a graph cannot do.

        False if the gates were written since they were last read, by a user or a checkpoint: they may say otherwise.
        """
        known = self._activity if is_current(self) else None
        return self.inactive == "frozen" and known is not None and not known.active

    def _with_probe(
        self, y: Tensor, x: Tensor, operands: LoRAOperands, activity: Activity | None,
        inactive: tuple[int, ...] | None, first: int,
    ) -> Tensor:  # fmt: skip
        """`y`, in whose backward the gates of inactive blocks get a gradient."""
        M = math.prod(x.shape[:-1])
        if M == 0:
            return y
        scale = 1.0 if activity is None else activity.probe_scale
        m, seed, seed_offset = None, 0, None
        if self.inactive == "probe" and self.probe_rows < M:
            step = 0 if activity is None else activity.step
            m, seed = self.probe_rows, self._seed + step * 0x10001 + first
            if activity is None:
                # A graph has the same `seed` in every replay; what it draws on the device differs.
                seed_offset = torch.randint(2**31, (), device=x.device)
            scale *= M / m
        lora_A, lora_B, gate, threshold, factor = operands[:5]
        # Detached: the probe gives A and B no gradient, and the graph should not say that they get one.
        result: Tensor = ProbeGates.apply(  # type: ignore[no-untyped-call]
            y, gate, x, lora_A.detach(), lora_B.detach(), threshold, factor * scale, inactive, m, seed, seed_offset
        )
        return result

    def _in_autocast_dtype(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The input and the base parameters, under autocast in its dtype."""
        weight: Any
        bias: Any
        try:
            # Not as attributes: access to parameters in nn.Module takes longer than all the rest here.
            weight, bias = self._parameters[self.weight_name], self._parameters[self.bias_name]
        except KeyError:
            weight, bias = self.base_weight, self.base_bias
        device = x.device.type
        if device == "meta":
            # Autocast knows no such device.
            return x, weight, bias
        if not torch.is_autocast_enabled(device) or not x.is_floating_point() or x.dtype == torch.float64:
            return x, weight, bias
        dtype = torch.get_autocast_dtype(device)
        return (
            x.to(dtype),
            self._cached_cast(weight, dtype, "weight"),
            None if bias is None else self._cached_cast(bias, dtype, "bias"),
        )

    def _cached_cast(self, parameter: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        # autocast caches the casts of trainable leaves only, so a frozen weight would be cast at every call. This cache
        # holds the cast until the parameter changes; training holds it from forward to backward anyway.
        if parameter.dtype == dtype:
            return parameter
        uncached = parameter.requires_grad or torch.compiler.is_compiling() or ops.needs_reference()
        # FSDP frees the weight after the layer has run; a cached cast would cost the memory that sharding saves.
        uncached = uncached or self._sharded_gate is not None
        if uncached or not torch.is_autocast_cache_enabled():
            return parameter.to(dtype)
        key = (id(parameter), parameter.data_ptr(), version(parameter), dtype)
        cached = self._cast.get(name)
        if cached is None or cached[0] != key:
            # Never an inference tensor, even if the first call is under inference_mode: autograd could not save it.
            with torch.inference_mode(False), torch.no_grad():
                cached = self._cast[name] = (key, parameter.to(dtype))
        return cached[1]


@contextlib.contextmanager
def gates_on_device() -> Iterator[None]:
    """Compute as a CUDA graph does: inside, the gates on the device decide which blocks are active.

    Warm up in here before a capture. Without this context the warm-up uses the active blocks that the host knows. The
    capture would then be the first to compile the kernels of the graph, and could not measure which algorithm is the
    fastest.

        with slora.gates_on_device(), torch.cuda.stream(side):
            for _ in range(3):
                step()
        with torch.cuda.graph(graph):
            step()
    """
    token = _on_device.set(True)
    try:
        yield
    finally:
        _on_device.reset(token)


def _capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, or `gates_on_device` prepares one; or `x` is on meta, without values."""
    return _on_device.get() or (torch.cuda.is_current_stream_capturing() if x.is_cuda else x.is_meta)


def _exporting() -> bool:
    """Whether torch.export records; under torch.compile `is_exporting()` is traced as true, too."""
    return torch.compiler._is_exporting_flag


def _within(numbers: tuple[int, ...], blocks: slice) -> tuple[int, ...]:
    """The block numbers that are in `blocks`, counted from its first."""
    return tuple(i - blocks.start for i in numbers if blocks.start <= i < blocks.stop)
