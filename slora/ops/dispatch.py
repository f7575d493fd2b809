"""Which backend computes the operator: `SLORA_BACKEND` and what this machine has.

| `SLORA_BACKEND` | on CUDA | on the CPU |
|---|---|---|
| `auto` (default) | the fastest algorithm measured for the shape, of Triton kernels or cuBLAS | PyTorch calls |
| `triton` | Triton kernels, without a measurement | an error, unless `TRITON_INTERPRET=1` |
| `torch` | PyTorch calls (`slora.ops.backends.eager`) | the same |
| `reference` | `slora.reference`, differentiable any number of times | the same |

The kernels support bf16 and fp16 on GPUs from compute capability 8.0 on, up to 64 blocks of a rank up to 256, and sizes
that are multiples of 8 (`Triton.supports`). Everything else, fp32 above all, is computed by PyTorch calls under `auto`
and `triton` as well. Triton's interpreter supports fp32, too, but multiplies bf16 wrongly: with it, bf16 is an error
under `triton` and computed by PyTorch calls under `auto`.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from slora.errors import ConfigError, MissingDependencyError
from slora.ops.backends import Backend
from slora.ops.backends.eager import EAGER
from slora.ops.backends.triton import Triton
from slora.ops.operands import LoRAOperands

SETTINGS = ("auto", "triton", "torch", "reference")
TRITON, PINNED = Triton(), Triton(pinned=True)
# Looked up once here, because torch.compile cannot trace the look-up.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def setting() -> str:
    """Return what `SLORA_BACKEND` asks for.

    Raises:
        ConfigError: the variable holds an unknown name.
    """
    value = os.environ.get("SLORA_BACKEND", "auto")
    return value if value in SETTINGS else _normalised(value)


def _normalised(value: str) -> str:
    name = value.strip().lower() or "auto"
    if name not in SETTINGS:
        raise ConfigError(f"SLORA_BACKEND={name!r} is unknown; use one of {', '.join(SETTINGS)}")
    return name


def backend_for(x: Tensor, operands: LoRAOperands | None = None) -> Backend | None:
    """Return the backend that computes a call with rows of `x`, or of dy; None where `slora.reference` does.

    Raises:
        ConfigError, MissingDependencyError: see `check_device`.
    """
    backend = _decided(setting(), x.device, x.dtype)
    return backend if backend is None or backend.supports(x, operands) else EAGER


@functools.cache
def _decided(wanted: str, device: torch.device, dtype: torch.dtype) -> Backend | None:
    """The backend for a device and dtype, before `supports` is asked; cached, because a layer asks twice per step."""
    if wanted == "reference":
        return None
    check_device(device, dtype)
    if not _kernels_serve(device, dtype):
        return EAGER
    return PINNED if wanted == "triton" else TRITON


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Check that `SLORA_BACKEND=triton`, if set, can compute an x on `device`.

    Raises:
        ConfigError: x is not on a CUDA device and Triton's interpreter is off, or x is bf16 and it is on.
        MissingDependencyError: Triton is not installed.
    """
    if setting() != "triton":
        return
    if not has_triton():
        raise MissingDependencyError(
            'SLORA_BACKEND=triton needs Triton; pip install "slora[triton]" (Linux), or use SLORA_BACKEND=auto'
        )
    if device.type != "cuda" and not interpreting():
        raise ConfigError(
            f"SLORA_BACKEND=triton needs a CUDA device but x is on {device}; move the model to the GPU, use "
            f"SLORA_BACKEND=auto, or set TRITON_INTERPRET=1 before the first import of slora.kernels to try the "
            f"kernels on the CPU, slowly and not in bf16"
        )
    if interpreting() and dtype == torch.bfloat16:
        raise ConfigError(
            f"SLORA_BACKEND=triton with TRITON_INTERPRET=1 cannot compute in {dtype}, which Triton's interpreter "
            f"multiplies wrongly; use torch.float16 or torch.float32, or unset TRITON_INTERPRET and run on a GPU"
        )


def _kernels_serve(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton kernels compute this device and dtype by the table above, once `check_device` has passed."""
    wanted, gpu = setting(), device.type == "cuda"
    if wanted == "auto":
        served = gpu and has_triton() and not (interpreting() and dtype == torch.bfloat16)
    else:
        served = wanted == "triton"
    return served and (not gpu or torch.cuda.get_device_capability(device) >= (8, 0))


def computed_by(gpu: bool) -> str:
    """Return in words who computes adapted layers with the setting, on a GPU or on the CPU."""
    wanted = setting()
    if wanted == "reference":
        return "slora.reference"
    if wanted == "torch" or (wanted == "auto" and not (gpu and has_triton())):
        return "PyTorch calls"
    if not has_triton():
        return "Triton kernels, but Triton is missing"
    if wanted == "auto":
        return "Triton kernels or PyTorch calls, whichever was measured to be faster"
    if not gpu:
        return "Triton kernels in its interpreter" if interpreting() else "Triton kernels, which need a GPU"
    return "Triton kernels"


def has_triton() -> bool:
    """Return whether Triton is installed, without importing it."""
    return _HAS_TRITON


def interpreting() -> bool:
    """Return whether Triton's interpreter is asked for."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
