"""accelerate, the processes of a run, and the signals that stop it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from slora.runs.settings import TrainSettings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.state import PartialState


T = TypeVar("T")


def meet(settings: TrainSettings) -> PartialState:
    """Join the processes that torchrun or `accelerate launch` has started, and return their shared state."""
    from accelerate.state import PartialState

    return PartialState(cpu=settings.device == "cpu")


def of_first(value: T) -> T:
    """Return the first process's `value` in all processes."""
    from accelerate.utils import broadcast_object_list

    values = [value]
    broadcast_object_list(values)
    return values[0]


def make_accelerator(settings: TrainSettings) -> Accelerator:
    """Return an `Accelerator` with the precision, accumulation and device of `settings`."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    cpu = settings.device == "cpu"
    if meet(settings).num_processes == 1:
        # accelerate has one state per process, but a second run may have another precision or device.
        AcceleratorState._reset_state(reset_partial_state=True)
    precision = settings.precision
    if precision == "auto":
        native = not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp32"
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        gradient_accumulation_steps=settings.gradient_accumulation,
        cpu=cpu,
        # With DDP's defaults gradients would reach the first layer whatever is active.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def leave() -> None:
    """Leave the process group, at the end of all work."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def prepared(
    accelerator: Accelerator, model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> Iterator[tuple[nn.Module, list[Any]]]:
    """Yield model and optimizers as accelerate wraps them; afterwards the model is unwrapped again."""
    before = set(model.__dict__)
    training = model.training
    wrapped, *wrapped_optimizers = accelerator.prepare(model, *optimizers)
    try:
        yield wrapped, wrapped_optimizers
    finally:
        model.train(training)
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            if name not in before:
                model.__dict__.pop(name, None)


@contextlib.contextmanager
def interruptible(request: Callable[[], None]) -> Iterator[None]:
    """Call `request` at the first Ctrl-C or SIGTERM inside the context; the second has its usual effect.

    A signal that is ignored, such as Ctrl-C in a background job of a shell, stays ignored. Outside the main thread,
    which alone receives signals, the context has no effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: Any) -> None:
        restore()
        request()

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()


def train_mode(model: nn.Module) -> None:
    """Put `model` into training mode, except frozen batch norms, whose statistics belong to the base model."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            parameter.requires_grad for parameter in module.parameters()
        ):
            module.eval()
