"""What every launcher asks: the properties of the device, how a tensor is handed to a kernel, and the launch itself.

A training step of a layer launches four kernels. In eager mode the GPU waits for the host wherever that takes longer
than the kernels run, so that `Launch` leaves out what Triton repeats at every launch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from slora.kernels import configs

# What the interpreter pretends to have: few enough that small tensors fill it, so that tests see several programs.
_INTERPRETED_SMS = 3


@functools.cache
def sms(device: torch.device) -> int:
    """Return how many SMs `device` has."""
    if device.type != "cuda":
        return _INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def arch(device: torch.device) -> int:
    """Return the entry of `configs.ARCHS` whose tile sizes `device` uses; the interpreter counts as 90."""
    if device.type != "cuda":
        return 90
    return configs.arch_of(torch.cuda.get_device_capability(device)[0])


class Box(NamedTuple):
    """Which tiles of a tensor TMA moves: what a kernel takes a descriptor for where `described`, else the tensor."""

    position: int
    """Of the tensor among the arguments."""
    shape: tuple[int, ...]
    """That the tensor is viewed in."""
    strides: tuple[int, ...]
    """Of that shape: multiples of 16 bytes, the last 1."""
    tile: tuple[int, ...]


class _Descriptor(NamedTuple):
    """What a launch reads of a `TensorDescriptor`, whose constructor would check it again every time."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str = "zero"
    round_f32_to_tf32: bool = False


# What Triton has compiled and which arguments are pointers, by kernel, device and key.
_compiled: dict[Any, tuple[Any, list[int]]] = {}


class Launch:
    """A launch for which only the tensors and floats are still to be given, as a layer repeats it in every step.

    Triton asks at every launch what each argument could be specialised on, and so finds what it has compiled; that
    takes longer than the launch. Here it does so once for each `key`. Whoever makes a launch keeps it by all that it is
    made of (`functools.lru_cache`).
    """

    def __init__(
        self, kernel: Any, device: torch.device, grid: tuple[int, int, int], key: tuple[Any, ...], numbers: list[int],
        constants: dict[str, Any], boxes: Sequence[Box] = (),
    ) -> None:  # fmt: skip
        """Prepare the launch.

        Args:
            kernel: a function under `triton.jit`: tensors and floats, then integers, then compile-time arguments.
            device: where the tensors are.
            grid: numbers of programs.
            key: what Triton compiles for: dtypes, which tensors are None, those of the `numbers` that it may specialise
                on, and what `constants` and `boxes` depend on. Tensors start at multiples of 16 bytes.
            numbers: the integers, in order.
            constants: the compile-time arguments and the options of the launch.
            boxes: of the tensors that TMA moves the tiles of; unused where it does not.
        """
        self.kernel, self.device, self.grid, self.numbers, self.constants = kernel, device, grid, numbers, constants
        self.key = kernel.fn, device, key
        self.boxes = boxes if described(device) else ()
        self.values = [constants[name] for name in kernel.arg_names if name in constants]
        self.compiled: tuple[Any, list[int]] | None = None

    def __call__(self, *args: Any) -> None:
        """Launch the kernel with these tensors and floats."""
        device, found, runtime = self.device, self.compiled, knobs.runtime
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            # Triton launches on the current device, not on that of the tensors.
            with torch.cuda.device(device):
                return self(*args)
        if found is None:
            found = self.compiled = _compiled.get(self.key)
        if found is None or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
            return self._by_triton(args)
        (compiled, pointers), given = found, [*args, *self.numbers, *self.values]
        for i, shape, strides, _ in self.boxes:
            given[i] = _Descriptor(given[i], shape, strides)
        for i in pointers:
            # Of a tensor, the launch would ask the driver whether the address is one of the device.
            given[i] = given[i].data_ptr()
        compiled.run(
            *self.grid, driver.active.get_current_stream(device.index), compiled.function, compiled.packed_metadata,
            None, None, None, *given,
        )  # fmt: skip

    def _by_triton(self, args: Sequence[Any]) -> None:
        given = [*args, *self.numbers]
        for i, shape, strides, tile in self.boxes:
            given[i] = TensorDescriptor(given[i], list(shape), list(strides), list(tile))
        compiled = self.kernel[self.grid](*given, **self.constants)
        # The interpreter compiles nothing.
        if compiled is not None:
            _compiled[self.key] = compiled, [i for i, value in enumerate(given) if isinstance(value, Tensor)]


def is_dense(tensor: Tensor) -> bool:
    """Return whether `tensor` is contiguous and starts at a multiple of 16 bytes."""
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def at_16(tensor: Tensor) -> Tensor:
    """Return `tensor`, copied if it does not start at a multiple of 16 bytes, as a view of a flat buffer may."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def aligned(matrix: Tensor) -> Tensor:
    """Return `matrix [rows, columns]` as the GEMM kernels read it, copied only where it is laid out otherwise.

    Columns have unit stride, every row starts at a multiple of 16 bytes, and rows do not overlap (as expanded ones do).
    The number of columns has to be a multiple of 16 bytes.
    """
    stride, unit = matrix.stride()
    fine = unit == 1 and stride * matrix.element_size() % 16 == 0 and stride >= matrix.shape[1]
    if fine and matrix.data_ptr() % 16 == 0:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def described(device: torch.device) -> bool:
    """Return whether TMA moves tiles on `device`; elsewhere kernels form their addresses."""
    return arch(device) >= 90


def cdiv(a: int, b: int) -> int:
    """Return `a / b` rounded up. Triton's own is made for kernels and takes ten times as long on the host."""
    return -(-a // b)


def persistent(device: torch.device, tile: configs.Gemm, rows: int, columns: int, blocks: int) -> tuple[int, int, int]:
    """Return the grid of a persistent kernel over the tiles of `[rows, columns]` of each block."""
    tiles = cdiv(rows, tile.BM) * cdiv(columns, tile.BN) * blocks
    return min(tiles, tile.programs * sms(device)), 1, 1
