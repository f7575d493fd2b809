"""`LoRABlocks`: gated LoRA blocks on one base weight, shared by every adapted layer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active, _is_tracing
from torch.fx import Proxy
from torch.nn.parallel import DistributedDataParallel

from slora import ops
from slora.config import SelectiveLoRAConfig
from slora.config import scaling as scaling_of
from slora.errors import ConfigError, StateError
from slora.gates.cache import Activity, Gated, GateMirror, doubt, unmoved, version
from slora.layers import untrained
from slora.layers.ddp import expected
from slora.module_tree.sharded import full, is_sharded
from slora.module_tree.wrappers import named_modules
from slora.ops import flops
from slora.ops.backends.eager import base
from slora.ops.checks import check_operands, fits
from slora.ops.gate_probe import ProbeGates
from slora.ops.operands import LoRAOperands

OWN: Any = object()
"""Stands for the layer's own bias where a call may give another."""
_on_device: ContextVar[bool] = ContextVar("slora_gates_on_device", default=False)
_OWN = ("lora_A", "lora_B", "gate")
_SETTINGS = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "blocks", "threshold", "inactive", "probe_every", "probe_rows",
    "gate_init", "enabled", "merged", "released", "_kept_weight", "_kept_update", "_mirror", "_activity", "_gate_key",
    "_sharded_gate", "_seed", "_cast", "_ready", "_base_class", "_slora_reads", "_slora_unseen",
    "_name", "_named",
)  # fmt: skip


class LoRABlocks(Gated):
    """Base of adapted layers: the LoRA parameters beside a base weight `[N, K]`, and the product with both.

    Parameters: `lora_A [blocks, r, K]`, `lora_B [blocks, N / blocks, r]`, `gate [blocks]`, all fp32.
    A subclass names its base weight in `weight_name` and `bias_name` and calls `project` in its forward.

    Attributes:
        enabled: False inside `slora.disabled(model)`: the layer is the base layer.
        merged: True while the update is folded into the base weight.
        released: True once the policy "frozen" has freed the matrices (`slora.release_frozen`).
    """

    weight_name: ClassVar[str] = "weight"
    bias_name: ClassVar[str] = "bias"

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    probe_rows: int
    gate_init: float
    _base_class: type[nn.Module]

    def _adopt(self, module: nn.Module) -> None:
        """Become a copy of `module` that shares its parameters, hooks, children and mode."""
        nn.Module.__init__(self)
        self.__dict__.update(module.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            self.__dict__[registry] = dict(module.__dict__[registry])
        # Bound to `module`: what was compiled by itself is compiled as a part of what it is in, or again.
        self._compiled_call_impl = None
        self._base_class = type(module)

    def plain(self) -> nn.Module:
        """Return a module of the class that was adapted, sharing the base parameters, without the blocks."""
        module = self._base_class.__new__(self._base_class)
        nn.Module.__init__(module)
        own = {*_OWN, "_compiled_call_impl", *_SETTINGS}
        module.__dict__.update({key: value for key, value in self.__dict__.items() if key not in own})
        for registry in ("_parameters", "_buffers", "_modules"):
            entries = self.__dict__[registry]
            module.__dict__[registry] = {key: value for key, value in entries.items() if key not in own}
        return module

    def __prepare_scriptable__(self) -> Any:
        raise StateError(
            "torch.jit.script cannot read an adapted layer; call slora.merge_and_unload(model) first, or use "
            "torch.export.export or torch.jit.trace"
        )

    @classmethod
    def choose_blocks(cls, config: SelectiveLoRAConfig, module: nn.Module, name: str) -> int:
        """Return how many blocks `config` gives to `module`.

        Raises:
            ConfigError: the number or the rank does not fit the module; nothing has been changed.
        """
        weight: Tensor = getattr(module, cls.weight_name)
        out_features = weight.shape[0]
        r, limit = config.rank_of(name), min(weight.shape)
        if r > limit:
            raise ConfigError(
                f"r={r} is above min(in_features, out_features)={limit}{of_layer(name)}; lower r"
                + (", give this layer a rank_pattern entry or list it in exclude_modules" if name else "")
            )
        blocks = cls._automatic_blocks(module, name) if config.blocks == "auto" else config.blocks
        if out_features % blocks:
            raise ConfigError(
                f"blocks={blocks} does not divide out_features={out_features}{of_layer(name)}; "
                f'use a divisor or blocks="auto"'
            )
        return blocks

    @classmethod
    def _automatic_blocks(cls, module: nn.Module, name: str) -> int:
        return 1

    def _add_blocks(self, config: SelectiveLoRAConfig, blocks: int, name: str, mirror: GateMirror | None) -> None:
        weight, r = self.base_weight, config.rank_of(name)
        out_features, in_features = weight.shape
        for parameter in (weight, self.base_bias):
            if parameter is not None:
                parameter.requires_grad_(False)
                if config.base_dtype is not None:
                    parameter.data = parameter.data.to(config.base_dtype)
        self.r, self.lora_alpha, self.use_rslora = r, config.alpha_of(name), config.use_rslora
        self.lora_dropout = config.lora_dropout
        self.blocks, self.threshold, self.gate_init = blocks, config.threshold, config.gate_init
        self.inactive, self.probe_every, self.probe_rows = (
            config.inactive,
            config.probe_every,
            config.probe_rows,
        )
        self.enabled, self.merged, self.released = True, False, False
        kwargs: dict[str, Any] = {"device": weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(blocks, r, in_features, **kwargs))
        self.lora_B = nn.Parameter(torch.empty(blocks, out_features // blocks, r, **kwargs))
        self.gate = nn.Parameter(torch.empty(blocks, **kwargs))
        LoRABlocks.reset_parameters(self)
        flops.register()
        untrained.register()
        # What `slora.unmerge` needs: the base weight itself, or the update that takes the merged one off.
        self._kept_weight: Tensor | None = None
        self._kept_update: list[tuple[Tensor, Tensor, float, int]] = []
        self._mirror = GateMirror() if mirror is None else mirror
        self._activity: Activity | None = None
        self._gate_key: tuple[Tensor, int, float] | None = None
        self._seed, self._name = _seed_of(name), name
        self._cast: dict[str, tuple[tuple[Any, ...], Tensor]] = {}
        self._ready: tuple[Any, ...] | None = None
        self._mirror.join(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the blocks as `slora.inject` does: A Kaiming-uniform, B = 0, every gate `gate_init`.

        The base weight and bias stay what they are: a pretrained model's. Where `to_empty` has left them without
        values, they come from its checkpoint, before or after this call; for random ones call `reset_parameters` of
        the class that was adapted, as in `nn.Linear.reset_parameters(layer)`.

        Raises:
            StateError: the layer is merged, or its matrices were freed.
        """
        kind = type(self).__name__
        if self.merged:
            raise StateError(f"this {kind} is merged; call slora.unmerge(model) before reset_parameters")
        if self.released:
            raise StateError(f"the LoRA matrices were freed by inactive='frozen': this {kind} has none to initialise")
        # One by one, for the fan-in of each. A detached tensor is seen to be written, one of `.data` is not.
        for A in self.lora_A.detach():
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.lora_B.zero_()
        self.gate.fill_(self.gate_init)

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

    @property
    def scaling(self) -> float:
        """The factor `c` in front of every update."""
        return scaling_of(self.lora_alpha, self.r, self.use_rslora)

    @torch.no_grad()
    def merged_weight(self, scale: float = 1.0) -> Tensor:
        """Return a new `[N, K]` tensor `W + scale * c * B @ A` over the active blocks, in the dtype of `W`.

        The sum is formed in fp32 (fp64 for fp64 weights) and rounded once. Rounding `W + delta` to 16 bits
        loses part of a small update: merge for inference, never to go on training.
        """
        weight = full(self.base_weight.detach())
        if self.merged:
            return weight.clone()
        self._mirror.reread()
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        result = weight.to(wide, copy=True)
        n = weight.shape[0] // self.blocks
        lora_A, lora_B = full(self.lora_A), full(self.lora_B)
        for i in self.activity().active:
            block = result[i * n : (i + 1) * n]
            block.addmm_(lora_B[i].to(wide), lora_A[i].to(wide), alpha=scale * self.scaling)
        return result.to(weight.dtype)

    def project(self, x: Tensor, first: int = 0, count: int | None = None, given: Any = OWN) -> Tensor:
        """Return `x @ W.T + b` with the update of the active blocks; `x [..., K]`, result `[..., N]`.

        With `first` and `count` only the outputs of blocks `first, ..., first + count - 1` are computed, which
        is what attention needs where query, key and value come from different inputs. A bias `[N]`, or None, may be
        given in place of the layer's own.
        """
        x, weight, bias = self._in_dtype_of(x)
        if given is not OWN:
            cast = given is not None and not x.is_meta and torch.is_autocast_enabled(x.device.type)
            bias = given.to(weight.dtype) if cast else given
        part = None if count is None or (first, count) == (0, self.blocks) else slice(first, first + count)
        if part is not None:
            rows = slice(*(i * weight.shape[0] // self.blocks for i in (part.start, part.stop)))
            weight, bias = weight[rows], None if bias is None else bias[rows]
        if self.merged or not self.enabled:
            return base(x if self.merged else expected(self, x, False), weight, bias)
        if torch.compiler.is_compiling() or _capturing(x) or _are_functorch_transforms_active() or _is_tracing():
            return self._project_on_device(x, weight, bias, part)
        activity = self._activity
        if activity is None or not unmoved(self):
            activity = self.activity()
        probes = activity.probe and torch.is_grad_enabled() and self.gate.requires_grad
        if DistributedDataParallel._active_ddp_module is not None or self._mirror.ddp is not None:
            x = expected(self, x, activity.active != ())
        if not (activity.active or probes):
            return base(x, weight, bias)
        operands = self._operands(activity, part, x, weight, bias)
        y = ops.apply(x, weight, bias, operands) if operands.active else base(x, weight, bias)
        inactive = activity.inactive if part is None else _within(activity.inactive, part)
        return self._probed(y, x, operands, activity, inactive, first) if probes and inactive else y

    def _project_on_device(self, x: Tensor, weight: Tensor, bias: Tensor | None, part: slice | None) -> Tensor:
        """`project` where a graph is made or calls are transformed: the gates themselves decide, which may be others
        each time."""
        if self.released:
            return base(x, weight, bias)
        if ops.wants_plain():
            learns = self.inactive != "frozen" and (torch.compiler.is_compiling() or not _is_tracing())
            return ops.plain(x, weight, bias, self._blocks(part, None), every_gate=learns)
        # Known, because nothing can change it.
        active = () if not torch.compiler.is_compiling() and self._off_for_good() else None
        operands = self._blocks(part, active)
        if not torch.compiler.is_compiling():
            x = expected(self, x, active is None)
        y = base(x, weight, bias) if active == () else ops.apply(x, weight, bias, self._with_seed(operands, x))
        # An exported program is for inference, and how many rows a probe reads would fix how many its inputs may have.
        learns = torch.is_grad_enabled() and self.gate.requires_grad and not _exporting()
        if self.inactive != "frozen" and learns:
            y = self._probed(y, x, operands, None, None, 0 if part is None else part.start)
        return y

    def _operands(
        self, activity: Activity, part: slice | None, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> LoRAOperands:
        """The blocks for one call, checked; those of the last call where nothing has changed since."""
        ready = self._ready if part is None else None
        if ready is not None and ready[0] is activity and ready[1] == self._described(weight, bias) and fits(x, weight):
            operands: LoRAOperands = ready[2]
            return self._with_seed(operands, x) if operands.dropout else operands
        active = activity.active if part is None else _within(activity.active, part)
        if self.released and active:
            raise StateError(
                "a gate was raised above the threshold after its LoRA matrices were freed by inactive='frozen'; "
                "lower it again, or train with inactive='probe'"
            )
        operands = self._blocks(part, active)
        if active:
            operands = self._with_seed(operands, x)
            # Where FSDP has rounded the gate to 16 bits for the forward, it may be on the other side of the threshold.
            rounded = self._sharded_gate is not None and operands.gate.dtype != self._sharded_gate.dtype
            check_operands(x, weight, bias, operands._replace(active=None) if rounded else operands)
            if part is None and weight.grad_fn is None:
                self._ready = activity, self._described(weight, bias), operands
        return operands

    def _described(self, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        """What tells whether operands that were checked are still those of the layer: which tensors, and what they are,
        since `.data` may be another under the same parameter."""
        lora_A, lora_B = self._parameters.get("lora_A"), self._parameters.get("lora_B")
        if lora_A is None or lora_B is None:
            # A parametrization, or a replica: made anew at every call.
            return (object(),)
        of_bias = () if bias is None else (id(bias), bias.shape, bias.dtype)
        return (
            id(lora_A), lora_A.shape, lora_A.dtype, id(lora_B), lora_B.shape, lora_B.dtype, id(weight), weight.shape,
            weight.dtype, *of_bias,
        )  # fmt: skip

    def _blocks(self, part: slice | None, active: Sequence[int] | None) -> LoRAOperands:
        """The blocks of `part`, or all."""
        lora_A: Tensor = self.lora_A
        lora_B: Tensor = self.lora_B
        gate: Tensor = self.gate
        if part is not None:
            lora_A, lora_B, gate = lora_A[part], lora_B[part], gate[part]
        dropout = self.lora_dropout if self.training else 0.0
        return LoRAOperands(lora_A, lora_B, gate, self.threshold, self.scaling, active, dropout)

    def _with_seed(self, operands: LoRAOperands, x: Tensor) -> LoRAOperands:
        """The operands with a new seed of the dropout's mask, if there is one."""
        if not operands.dropout:
            return operands
        return operands._replace(seed=torch.randint(2**62, (), device=x.device))

    def _off_for_good(self) -> bool:
        """Whether no block is active and none will be; without looking at the gates, which a graph cannot.

        Gates that were written since they were read last, by a user or a checkpoint, may say otherwise.
        """
        known = self._activity if unmoved(self) else None
        return self.inactive == "frozen" and known is not None and not known.active

    def _probed(
        self, y: Tensor, x: Tensor, operands: LoRAOperands, activity: Activity | None,
        inactive: tuple[int, ...] | None, first: int,
    ) -> Tensor:  # fmt: skip
        """`y`, in whose backward the gates of inactive blocks get a gradient."""
        M = math.prod(x.shape[:-1])
        if M == 0:
            return y
        scale = 1.0 if activity is None else activity.probe_scale
        m, seed, shift = None, 0, None
        if self.inactive == "probe" and self.probe_rows < M:
            step = 0 if activity is None else activity.step
            m, seed = self.probe_rows, self._seed + step * 0x10001 + first
            if activity is None:
                # A graph is the same at every step; what it draws on the device is not.
                shift = torch.randint(2**31, (), device=x.device)
            scale *= M / m
        lora_A, lora_B, gate, threshold, scaling = operands[:5]
        # Detached, so that the graph says which parameters get a gradient.
        result: Tensor = ProbeGates.apply(  # type: ignore[no-untyped-call]
            y, gate, x, lora_A.detach(), lora_B.detach(), threshold, scaling * scale, inactive, m, seed, shift
        )
        return result

    def _in_dtype_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The input and the base parameters in the dtype that autocast asks for."""
        weight: Any
        bias: Any
        try:
            # Not as attributes, for which nn.Module takes longer than for all the rest here.
            weight, bias = self._parameters[self.weight_name], self._parameters[self.bias_name]
        except KeyError:
            weight, bias = self.base_weight, self.base_bias
        device = x.device.type
        if device == "meta":
            # Of which autocast knows nothing.
            return x, weight, bias
        if not torch.is_autocast_enabled(device) or not x.is_floating_point() or x.dtype == torch.float64:
            return x, weight, bias
        dtype = torch.get_autocast_dtype(device)
        return (
            x.to(dtype),
            self._as(weight, dtype, "weight"),
            None if bias is None else self._as(bias, dtype, "bias"),
        )

    def _as(self, parameter: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        # autocast caches the casts of trainable leaves only, so a frozen weight would be cast at every call.
        # The cast is kept until the parameter changes; training holds it from forward to backward anyway.
        if parameter.dtype == dtype:
            return parameter
        fleeting = parameter.requires_grad or torch.compiler.is_compiling() or ops.wants_plain()
        # FSDP frees the weight after the layer has run; a cast that is kept would be what sharding saves.
        fleeting = fleeting or self._sharded_gate is not None
        if fleeting or not torch.is_autocast_cache_enabled():
            return parameter.to(dtype)
        key = (id(parameter), parameter.data_ptr(), version(parameter), dtype)
        cached = self._cast.get(name)
        if cached is None or cached[0] != key:
            # Not an inference tensor, whoever comes first: training could not save it.
            with torch.inference_mode(False), torch.no_grad():
                cached = self._cast[name] = (key, parameter.to(dtype))
        return cached[1]

    def release(self) -> int:
        """Free the LoRA matrices for good and return the bytes; `slora.release_frozen` calls this."""
        freed = 0
        for parameter in (self.lora_A, self.lora_B):
            freed += parameter.nbytes + (0 if parameter.grad is None else parameter.grad.nbytes)
            parameter.requires_grad_(False)
            parameter.grad = None
        self.gate.requires_grad_(False)
        self.gate.grad = None
        self._shrink()
        return freed

    def _shrink(self) -> None:
        out_features, in_features = self.base_weight.shape
        self.lora_A.data = self.lora_A.data.new_empty(self.blocks, 0, in_features)
        self.lora_B.data = self.lora_B.data.new_empty(self.blocks, out_features // self.blocks, 0)
        self.released = True

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        own = {id(t): t for p in (self._parameters.get(name) for name in _OWN) if p is not None for t in (p, p.grad)}

        def keep_fp32(tensor: Tensor) -> Tensor:
            result: Tensor = fn(tensor)
            if id(tensor) not in own or result.dtype == tensor.dtype or result.element_size() >= 4:
                return result
            # A cast of the model to 16 bits: there, most steps of a gate are below half a unit in the last place.
            return tensor.to(result.device, torch.float32)

        result = super()._apply(keep_fp32, recurse)  # type: ignore[no-untyped-call]
        self._cast.clear()
        self._activity = self._ready = None
        return result

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            # A parameter, the scaling, the threshold or the mode: what a call takes may be another.
            self.__dict__["_ready"] = None
            if name == "gate" and is_sharded(value):
                # Not as an attribute, which would be one more parameter.
                self.__dict__["_sharded_gate"] = value
            if name in ("inactive", "probe_every") and self.__dict__.get("_activity") is not None:
                doubt(self)
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Any:
        """See `nn.Module.train`. A change of mode reads the gates again, which averages of weights are put into."""
        if mode != self.training:
            doubt(self)
        return super().train(mode)

    def __delattr__(self, name: str) -> None:
        self.__dict__["_ready"] = None
        super().__delattr__(name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "merged"] = torch.ones((), dtype=torch.bool)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name = prefix[:-1] or type(self).__name__
        if self.merged:
            # `slora.unmerge` would put the old weight back over the loaded one.
            raise StateError(f"{name!r} is merged; call slora.unmerge(model) before load_state_dict")
        if prefix + "merged" in state_dict:
            raise StateError(
                f"this state was saved while {name!r} was merged, so that its weight holds the update already; "
                f"save it after slora.unmerge(model)"
            )
        incoming = state_dict.get(prefix + "lora_A")
        if isinstance(incoming, Tensor) and incoming.dim() == 3 and incoming.shape[1] == 0 and not self.released:
            self.release()
        for key in (prefix + own for own in _OWN):
            value = state_dict.get(key)
            if isinstance(value, Tensor) and value.is_floating_point() and value.element_size() < 4:
                # With assign=True it would be the parameter. `state_dict` is a copy of the caller's.
                state_dict[key] = value.float()
        self._ready = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cast": {}, "_ready": None, "_activity": None, "_gate_key": None, "_named": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mirror.join(self)

    def _describe(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, blocks={self.blocks}, inactive={self.inactive!r}"


@contextlib.contextmanager
def gates_on_device() -> Iterator[None]:
    """Compute what a CUDA graph would record: inside, the device's own gates decide which blocks are active.

    Warm up in here before a capture. Without it warm-up knows the active blocks, which the graph does not, so that
    kernels may be compiled first inside the capture, where no choice of form can be measured either.

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


def recorded(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return what `torch.fx.symbolic_trace` gets of `module`: one call, as of a layer of torch.nn."""
    tracer: Any = next(value for value in (*args, *kwargs.values()) if isinstance(value, Proxy)).tracer
    if module is tracer.root:
        raise StateError(
            f"torch.fx cannot record {type(module).__name__}, whose own forward reads the weights of adapted layers; "
            f"call slora.merge_and_unload(model) first, or record a module that holds it"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


def _capturing(x: Tensor) -> bool:
    """Whether a CUDA graph records what happens to `x`, or should be prepared; or there is nothing in `x` at all."""
    return _on_device.get() or (torch.cuda.is_current_stream_capturing() if x.is_cuda else x.is_meta)


def _exporting() -> bool:
    """Whether torch.export records; torch.compile takes `is_exporting()` to be true whenever it records."""
    return torch.compiler._is_exporting_flag


def _within(blocks: tuple[int, ...], part: slice) -> tuple[int, ...]:
    """Those of `blocks` that are in `part`, counted from its first."""
    return tuple(i - part.start for i in blocks if part.start <= i < part.stop)


def of_layer(name: str) -> str:
    """Return `name` as the end of a sentence; a layer made by hand has none."""
    return f" of {name!r}" if name else ""


def _seed_of(name: str) -> int:
    """A number that differs between layers and is the same in every run."""
    seed = 0
    for byte in name.encode():
        seed = (seed * 131 + byte) & 0xFFFFFFFF
    return seed


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRABlocks]]:
    """Yield `(name, layer)` for every adapted layer of `model`, in the order of `named_modules`.

    Names are those in the plain model, whatever wraps it or its parts (`slora.module_tree.wrappers`).
    """
    for name, module in named_modules(model):
        if isinstance(module, LoRABlocks):
            yield name, module
