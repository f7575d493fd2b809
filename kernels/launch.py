"""What every launcher asks: the properties of the device, how a tensor is handed to a kernel, and the launch itself.

A training step of a layer launches four kernels. In eager mode the GPU waits for the host wherever that takes longer
than the kernels run, so that `run` and `boxed` leave out what Triton repeats at every launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

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


# A compiled kernel and its compile-time arguments, by kernel, device and key.
_compiled: dict[Any, tuple[Any, list[Any]]] = {}


def run(
    kernel: Any, device: torch.device, grid: tuple[int, int, int], key: tuple[Any, ...], args: tuple[Any, ...],
    constants: Callable[[], dict[str, Any]],
) -> None:  # fmt: skip
    """Launch `kernel` on `device`, where the tensors of `args` are.

    Triton asks at every launch what each argument could be specialised on, and so finds what it has compiled; that
    takes longer than the launch. Here it does so once for each `key`.

    Args:
        kernel: a function under `triton.jit` whose compile-time arguments come last.
        grid: numbers of programs.
        key: what Triton compiles for: dtypes, which of `args` are None, the integers that it may specialise on, and
            what `constants` depend on. Tensors are aligned to 16 bytes.
        args: the other arguments, in order.
        constants: makes the compile-time arguments and the options of the launch.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device, not on that of the tensors.
        with torch.cuda.device(device):
            return run(kernel, device, grid, key, args, constants)
    key = kernel.fn, device, key
    found = _compiled.get(key)
    runtime = knobs.runtime
    if found is None or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
        given = constants()
        compiled = kernel[grid](*args, **given)
        # The interpreter compiles nothing.
        if compiled is not None:
            _compiled[key] = compiled, [given[name] for name in kernel.arg_names[len(args) :]]
        return
    compiled, values = found
    compiled.run(
        *grid, driver.active.get_current_stream(device.index), compiled.function, compiled.packed_metadata,
        None, None, None, *args, *values,
    )  # fmt: skip


def at_16(tensor: Tensor) -> Tensor:
    """Return `tensor`, copied if it does not start at a multiple of 16 bytes, as a view of a flat buffer may."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def aligned(matrix: Tensor) -> Tensor:
    """Return `matrix [rows, columns]` as the GEMM kernels read it, copied only where it is laid out otherwise.

    Columns have unit stride, every row starts at a multiple of 16 bytes, and rows do not overlap (as expanded ones do).
    The number of columns has to be a multiple of 16 bytes.
    """
    stride, size = matrix.stride(0), matrix.element_size()
    if matrix.stride(1) == 1 and stride * size % 16 == 0 and stride >= matrix.shape[1] and matrix.data_ptr() % 16 == 0:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def described(device: torch.device) -> bool:
    """Return whether TMA moves tiles on `device`; elsewhere kernels form their addresses."""
    return arch(device) >= 90


class _Box(TensorDescriptor):  # type: ignore[misc]
    """A tensor descriptor without the checks of its constructor, which take four times as long as all the rest of it.

    What they check holds by `aligned`.
    """

    def __init__(self, base: Tensor, shape: Sequence[int], strides: Sequence[int], box: list[int]) -> None:
        self.base, self.shape, self.strides, self.block_shape = base, shape, strides, box


def boxed(matrix: Tensor, *box: int, shape: Sequence[int] | None = None, strides: Sequence[int] | None = None) -> Any:
    """Return what a kernel takes tiles of the shape `box` from: a descriptor for TMA, or the matrix.

    Args:
        matrix: as `aligned` returns it.
        shape: another shape that it is viewed in.
        strides: of that shape, by default contiguous; multiples of 16 bytes, the last 1.
    """
    if not described(matrix.device):
        return matrix
    if shape is None:
        shape, strides = matrix.shape, matrix.stride()
    elif strides is None:
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, size * strides[0])
    return _Box(matrix, shape, strides, list(box))


def cdiv(a: int, b: int) -> int:
    """Return `a / b` rounded up. Triton's own is made for kernels and takes ten times as long on the host."""
    return -(-a // b)


def persistent(device: torch.device, tile: configs.Gemm, rows: int, columns: int, blocks: int) -> tuple[int, int, int]:
    """Return the grid of a persistent kernel over the tiles of `[rows, columns]` of each block."""
    tiles = cdiv(rows, tile.BM) * cdiv(columns, tile.BN) * blocks
    return min(tiles, tile.programs * sms(device)), 1, 1
