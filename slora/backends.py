"""Who computes the operator: `SLORA_BACKEND` and what this machine has.

| `SLORA_BACKEND` | on CUDA | on the CPU |
|---|---|---|
| `auto` (default) | the fastest form measured for the shape: Triton kernels or PyTorch calls | PyTorch calls |
| `triton` | Triton kernels, never a measurement | an error, unless `TRITON_INTERPRET=1` |
| `torch` | PyTorch calls (`slora.addmm`) | the same |
| `reference` | `slora.reference`, differentiable any number of times | the same |

fp64, layers of more than 64 blocks and GPUs before compute capability 8.0 are served by PyTorch calls under `auto` and
`triton` as well. Triton's interpreter multiplies bf16 wrongly: with it, bf16 is an error under `triton` and served by
PyTorch calls under `auto`.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from slora.errors import ConfigError, MissingDependencyError

BACKENDS = ("auto", "triton", "torch", "reference")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# As `kernels/slots.py` has it, which imports Triton.
_MAX_BLOCKS = 64
# Looked up once here, because torch.compile cannot trace the look-up.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def backend() -> str:
    """Return the backend that `SLORA_BACKEND` asks for.

    Raises:
        ConfigError: the variable holds an unknown name.
    """
    name = os.environ.get("SLORA_BACKEND", "auto").strip().lower() or "auto"
    if name not in BACKENDS:
        raise ConfigError(f"SLORA_BACKEND={name!r} is unknown; use one of {', '.join(BACKENDS)}")
    return name


def check_device(x: Tensor) -> None:
    """Raise where `SLORA_BACKEND=triton` cannot be obeyed for `x`.

    Raises:
        ConfigError: x is not on a CUDA device and Triton's interpreter is off, or x is bf16 and it is on.
        MissingDependencyError: Triton is not installed.
    """
    if backend() != "triton":
        return
    if not has_triton():
        raise MissingDependencyError(
            'SLORA_BACKEND=triton needs Triton; pip install "slora[triton]" (Linux), or use SLORA_BACKEND=auto'
        )
    if x.device.type != "cuda" and not interpreting():
        raise ConfigError(
            f"SLORA_BACKEND=triton needs a CUDA device but x is on {x.device}; move the model to the GPU, use "
            f"SLORA_BACKEND=auto, or set TRITON_INTERPRET=1 before the first import of slora.kernels to try the "
            f"kernels on the CPU, slowly and not in bf16"
        )
    if _misread(x):
        raise ConfigError(
            f"SLORA_BACKEND=triton with TRITON_INTERPRET=1 cannot compute in {x.dtype}, which Triton's interpreter "
            f"multiplies wrongly; use torch.float16 or torch.float32, or unset TRITON_INTERPRET and run on a GPU"
        )


def kernels_serve(x: Tensor, gate: Tensor | None = None) -> bool:
    """Return whether the Triton kernels compute for `x` and the blocks of `gate`, by the table above."""
    wanted = backend()
    if x.dtype not in _KERNEL_DTYPES or wanted in ("torch", "reference"):
        return False
    if gate is not None and gate.shape[0] > _MAX_BLOCKS:
        return False
    if wanted == "triton":
        check_device(x)
        return x.device.type != "cuda" or _new_enough(x.device)
    return x.device.type == "cuda" and has_triton() and _new_enough(x.device) and not _misread(x)


def _misread(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and interpreting()


@functools.cache
def _new_enough(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def computed_by(gpu: bool) -> str:
    """Return in words who computes adapted layers with the backend asked for, on a GPU or on the CPU."""
    wanted = backend()
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
