"""Which backend computes the operator: `SLORA_BACKEND` and what this machine has.

| `SLORA_BACKEND` | on CUDA | on the CPU |
|---|---|---|
| `auto` (default) | the fastest form measured for the shape: Triton kernels or PyTorch calls | PyTorch calls |
| `triton` | Triton kernels, never a measurement | an error, unless `TRITON_INTERPRET=1` |
| `torch` | PyTorch calls (`slora.ops.backends.eager`) | the same |
| `reference` | `slora.reference`, differentiable any number of times | the same |

The kernels serve bf16 and fp16 on GPUs from compute capability 8.0 on, up to 64 blocks of a rank up to 256, and sizes
that are multiples of 8 (`Triton.supports`); what they do not, fp32 above all, PyTorch calls compute under `auto` and
`triton` as well. Triton's interpreter serves fp32, too, but multiplies bf16 wrongly: with it, bf16 is an error under
`triton` and served by PyTorch calls under `auto`.
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
TRITON = Triton()
# Looked up once here, because torch.compile cannot trace the look-up.
_HAS_TRITON = importlib.util.find_spec("triton") is not None

# Decided once for each: a layer asks twice per step.
_decided: dict[tuple[str, torch.device, torch.dtype], Backend] = {}


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
    wanted = setting()
    if wanted == "reference":
        return None
    key = wanted, x.device, x.dtype
    backend = _decided.get(key)
    if backend is None:
        check_device(x)
        backend = _decided[key] = TRITON if _kernels_serve(x) else EAGER
    return backend if backend is EAGER or backend.supports(x, operands) else EAGER


def check_device(x: Tensor) -> None:
    """Raise where `SLORA_BACKEND=triton` cannot be obeyed for `x`.

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


def _kernels_serve(x: Tensor) -> bool:
    """Whether the Triton kernels compute for `x`, by the table above."""
    wanted = setting()
    if wanted in ("torch", "reference"):
        return False
    if wanted == "triton":
        return x.device.type != "cuda" or _new_enough(x.device)
    return x.device.type == "cuda" and has_triton() and _new_enough(x.device) and not _misread(x)


def _misread(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and interpreting()


@functools.cache
def _new_enough(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


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
