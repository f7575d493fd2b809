"""Which backend computes: the variable `SLORA_BACKEND`, the device, what is installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import slora
from slora.errors import ConfigError, MissingDependencyError
from slora.ops import dispatch, selective_linear
from slora.ops.backends import triton


@pytest.fixture(autouse=True)
def _decided_again() -> Iterator[None]:
    """Each decision holds for the process, and for the variables that it was made under."""
    dispatch._decided.cache_clear()
    yield
    dispatch._decided.cache_clear()


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "auto"), ("", "auto"), (" Torch ", "torch"), ("TRITON", "triton")]
)
def test_the_variable_is_read_at_every_call(value: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is not None:
        monkeypatch.setenv("SLORA_BACKEND", value)
    assert dispatch.setting() == expected


def test_an_unknown_backend_is_refused_with_the_list_of_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLORA_BACKEND", "cuda")
    with pytest.raises(ConfigError, match="'cuda' is unknown; use one of auto, triton, torch, reference"):
        dispatch.setting()


def test_auto_computes_on_a_cpu_in_pytorch_even_where_the_interpreter_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not dispatch._kernels_serve(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_other_backends_never_use_the_kernels(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLORA_BACKEND", backend)
    assert not dispatch._kernels_serve(torch.device("cpu"), torch.float32)


def arguments(dtype: torch.dtype) -> list[Tensor | None]:
    """x, W, no bias, A, B and gate of a small layer."""
    zeros = [torch.zeros(shape, dtype=dtype) for shape in ((5, 3), (4, 3), (1, 2, 3), (1, 4, 2))]
    return [*zeros[:2], None, *zeros[2:], torch.ones(1, dtype=dtype)]


def compiled(dtype: torch.dtype) -> object:
    torch._dynamo.reset()
    made = arguments(dtype)
    return torch.compile(lambda: selective_linear(*made, 0.1, 1.0), backend="eager", fullgraph=True)()


def fake(dtype: torch.dtype) -> object:
    mode = FakeTensorMode()
    made = (None if t is None else mode.from_tensor(t) for t in arguments(dtype))
    return selective_linear(*made, 0.1, 1.0)


def probe(dtype: torch.dtype) -> object:
    x, _, _, A, B, gate = arguments(dtype)
    return torch.ops.slora.gate_probe(torch.zeros(5, 4, dtype=dtype), x, A, B, gate, 0.1, 1.0, [0], 0, None)


CALLS: dict[str, Callable[[torch.dtype], object]] = {
    "the operator": lambda dtype: selective_linear(*arguments(dtype), 0.1, 1.0),
    "a layer": lambda dtype: slora.SelectiveLoRALinear(3, 4, r=2, dtype=dtype)(torch.zeros(5, 3, dtype=dtype)),
    "a compiled operator": compiled,
    "fake tensors": fake,
}


def refusal(call: Callable[[torch.dtype], object], dtype: torch.dtype) -> str:
    with pytest.raises(Exception) as raised:  # noqa: PT011  torch wraps it in an exception of its own
        call(dtype)
    return str(raised.value)


@pytest.mark.parametrize("call", CALLS)
def test_triton_on_a_cpu_is_refused_with_a_remedy_everywhere(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLORA_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    text = refusal(CALLS[call], torch.float32)
    assert "SLORA_BACKEND=triton needs a CUDA device but x is on cpu; move the model to the GPU" in text
    assert "TRITON_INTERPRET=1" in text


@pytest.mark.parametrize("call", [*CALLS.values(), probe], ids=[*CALLS, "the probe of gates"])
def test_bf16_in_the_interpreter_is_refused_with_a_remedy_everywhere(
    call: Callable[[torch.dtype], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("SLORA_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    text = refusal(call, torch.bfloat16)
    assert "SLORA_BACKEND=triton with TRITON_INTERPRET=1 cannot compute in torch.bfloat16" in text
    assert "use torch.float16 or torch.float32, or unset TRITON_INTERPRET and run on a GPU" in text


def test_auto_computes_bf16_in_pytorch_where_the_interpreter_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    for value, serves in (("1", False), ("0", True)):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert dispatch._kernels_serve(*on_cuda) == serves


def test_triton_without_triton_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLORA_BACKEND", "triton")
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(MissingDependencyError, match=r'needs Triton; pip install "slora\[triton\]"'):
        dispatch.check_device(torch.device("cpu"), torch.float32)


def test_auto_without_triton_computes_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda = torch.device("cuda"), torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert dispatch._kernels_serve(*on_cuda) == dispatch.has_triton()
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert not dispatch._kernels_serve(*on_cuda)


@pytest.mark.parametrize("wanted", ["auto", "triton"])
def test_gpus_older_than_the_kernels_are_served_by_pytorch(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda = torch.device("cuda"), torch.float32
    monkeypatch.setenv("SLORA_BACKEND", wanted)
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    for capability, serves in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert dispatch._kernels_serve(*on_cuda) == serves


@pytest.mark.parametrize(
    ("value", "gpu", "triton", "expected"),
    [
        ("auto", False, True, "PyTorch calls"),
        ("auto", True, False, "PyTorch calls"),
        ("auto", True, True, "whichever was measured to be faster"),
        ("torch", True, True, "PyTorch calls"),
        ("reference", True, True, "slora.reference"),
        ("triton", True, True, "Triton kernels"),
        ("triton", True, False, "Triton is missing"),
        ("triton", False, True, "which need a GPU"),
    ],
)
def test_the_doctor_is_told_who_computes(
    value: str, gpu: bool, triton: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_BACKEND", value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "has_triton", lambda: triton)
    assert expected in dispatch.computed_by(gpu)


def test_the_limit_of_blocks_is_that_of_the_kernels() -> None:
    packed = pytest.importorskip("slora.kernels.packed")
    configs = pytest.importorskip("slora.kernels.configs")
    assert (packed.MAX_BLOCKS, configs.RANKS[-1]) == (triton.MAX_BLOCKS, triton.MAX_RANK)


def test_importing_slora_and_computing_on_a_cpu_imports_no_triton() -> None:
    code = """
import sys, torch
before = "triton" in sys.modules
import slora, slora.ops, slora.ops.backends.autotune
slora.ops.selective_linear(torch.zeros(5, 3), torch.zeros(4, 3), None, torch.zeros(1, 2, 3), torch.zeros(1, 4, 2),
                           torch.ones(1), 0.1, 1.0)
assert before or "triton" not in sys.modules, "triton was imported"
assert not any(name.startswith("slora.kernels.") for name in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
