"""Bad arguments are named with what they are and what they should be, in every backend and when traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slora import ops
from slora.errors import ShapeError
from tests.ops.problem import SCALING, THRESHOLD, make

pytestmark = pytest.mark.usefixtures("poisoned")

FP8 = torch.float8_e4m3fn
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "K of x": ({"x": torch.randn(5, 36)}, r"x has shape [5, 36] and weight [36, 37]; expected x [..., K]"),
    "scalar x": ({"x": torch.randn(())}, r"x has shape [] and weight [36, 37]"),
    "bias": ({"bias": torch.randn(35)}, r"bias has shape [35]; expected [36], the rows of weight"),
    "gate matrix": ({"gate": torch.randn(3, 1)}, r"gate has shape [3, 1]; expected [blocks]"),
    "no gate": ({"gate": torch.randn(0)}, r"gate has shape [0]; expected [blocks] with at least one block"),
    "blocks that do not divide": (
        {"gate": torch.randn(5)},
        r"gate has 5 blocks, which does not divide the 36 rows of weight",
    ),
    "A of other blocks": ({"lora_A": torch.randn(2, 4, 37)}, r"lora_A has shape [2, 4, 37]; expected [3, r, 37]"),
    "A of another K": ({"lora_A": torch.randn(3, 4, 36)}, r"lora_A has shape [3, 4, 36]; expected [3, r, 37]"),
    "rank 0": ({"lora_A": torch.randn(3, 0, 37)}, r"rank 0; expected a rank from 1 to 256"),
    "rank 257": ({"lora_A": torch.randn(3, 257, 37)}, r"rank 257; expected a rank from 1 to 256"),
    "B": ({"lora_B": torch.randn(3, 12, 5)}, r"lora_B has shape [3, 12, 5]; expected [3, 12, 4]"),
    "dtype of x": (
        {"x": torch.ones(5, 37, dtype=torch.int64)},
        r"x has shape [5, 37] and dtype torch.int64; expected one of",
    ),
    "dtype of weight": (
        {"weight": torch.randn(36, 37).bfloat16()},
        r"weight has shape [36, 37] and dtype torch.bfloat16 but x has shape [5, 37] and dtype torch.float32; run",
    ),
    "dtype of A": (
        {"lora_A": torch.randn(3, 4, 37).bfloat16()},
        r"lora_A has shape [3, 4, 37] and dtype torch.bfloat16 and lora_B has shape [3, 12, 4] and dtype torch."
        r"float32; expected both in torch.float32",
    ),
    "dtype of A and B": (
        {"lora_A": torch.zeros(3, 4, 37).to(FP8), "lora_B": torch.zeros(3, 12, 4).to(FP8)},
        f"lora_B has shape [3, 12, 4] and dtype {FP8}; expected both in torch.float32",
    ),
    "dtype of A beside bf16": (
        {
            "x": torch.randn(5, 37).bfloat16(),
            "weight": torch.randn(36, 37).bfloat16(),
            "bias": None,
            "lora_A": torch.randn(3, 4, 37).half(),
        },
        r"expected both in torch.bfloat16 or torch.float32",
    ),
    "dtype of gate": (
        {"gate": torch.ones(3, dtype=torch.int64)},
        r"gate has shape [3] and dtype torch.int64; expected a floating",
    ),
    "device": (
        {"gate": torch.empty(3, device="meta")},
        r"gate of shape [3] is on meta but x of shape [5, 37] is on cpu; move the module",
    ),
    "no seed": (
        {"dropout": 0.5},
        r"seed is None with dropout=0.5; draw one with torch.randint(2**62, (), device='cpu')",
    ),
    "dtype of seed": (
        {"dropout": 0.5, "seed": torch.tensor(1.0)},
        r"seed has shape [] and dtype torch.float32; expected an int64 scalar",
    ),
    "seeds": (
        {"dropout": 0.5, "seed": torch.tensor([1, 2])},
        r"seed has shape [2] and dtype torch.int64; expected an int64 scalar",
    ),
    "device of seed": (
        {"dropout": 0.5, "seed": torch.empty((), dtype=torch.int64, device="meta")},
        r"seed is on meta but x of shape [5, 37] is on cpu; draw one with torch.randint",
    ),
    "falling active": ({"active": [2, 0]}, r"active is [2, 0]; expected the active ones of 3 blocks in rising order"),
    "active twice": ({"active": [1, 1]}, r"active is [1, 1]; expected"),
    "active block beyond the last": ({"active": [0, 3]}, r"active is [0, 3]; expected"),
    "certain dropout": ({"dropout": 1.0, "seed": torch.tensor(1)}, r"dropout=1.0 is not a probability below 1"),
    "negative dropout": ({"dropout": -0.1, "seed": torch.tensor(1)}, r"dropout=-0.1 is not a probability below 1"),
}
DEVICE_CASES = ("device", "device of seed")


@pytest.mark.parametrize("interpret", ["0", "1"])
@pytest.mark.parametrize("backend", ["auto", "triton", "torch", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_name_the_tensor_what_it_is_and_what_it_should_be(
    case: str, backend: str, interpret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With 0 the triton backend has no device to run on, which is said only of arguments that fit together.
    monkeypatch.setenv("SLORA_BACKEND", backend)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    changed, message = BAD[case]
    arguments = {**make(), **changed}
    with pytest.raises(ShapeError) as raised:
        ops.selective_linear(**arguments, threshold=THRESHOLD, scaling=SCALING)
    assert message in str(raised.value)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("backend", ["auto", "triton", "torch", "reference"])
@pytest.mark.parametrize("active", [[], [0], [0, 1], [0, 1, 2]], ids=str)
def test_active_blocks_that_the_gates_contradict_are_refused(
    active: list[int], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_BACKEND", backend)
    t = make()
    t["gate"] = torch.tensor([THRESHOLD, 0.0, 0.5])
    with pytest.raises(ShapeError) as raised:
        ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING, active=active)
    numbers = t["gate"].tolist()
    assert f"active is {active} but gate {numbers} has [0, 2] at or above threshold=0.1; list" in str(raised.value)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_listed_blocks_can_be_traced(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setenv("SLORA_BACKEND", backend)
    t = make()
    more = {"threshold": THRESHOLD, "scaling": SCALING, "active": [0, 2]}
    with FakeTensorMode() as mode:
        assert ops.selective_linear(**{name: mode.from_tensor(v) for name, v in t.items()}, **more).shape == (5, 36)
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: ops.selective_linear(**t, **more), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(t), ops.selective_linear(**t, **more))
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("case", [case for case in BAD if case not in DEVICE_CASES])
def test_bad_arguments_read_the_same_under_fake_tensors(
    case: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setenv("SLORA_BACKEND", backend)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    changed, message = BAD[case]
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = {
            name: mode.from_tensor(t) if isinstance(t, Tensor) else t for name, t in {**make_real(), **changed}.items()
        }
        with pytest.raises(ShapeError) as raised:
            ops.selective_linear(**fakes, threshold=THRESHOLD, scaling=SCALING)
    assert message in str(raised.value)


def make_real() -> dict[str, Tensor | None]:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        return make()


@pytest.mark.parametrize("case", ["K of x", "B", "rank 257", "dtype of weight", "no seed", "seeds"])
def test_bad_arguments_read_the_same_under_torch_compile(case: str) -> None:
    changed, message = BAD[case]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda t: ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING), backend="eager", fullgraph=True
    )
    with pytest.raises(Exception) as raised:  # noqa: PT011  torch wraps it in an exception of its own
        compiled({**make(), **changed})
    assert message in str(raised.value)
    torch._dynamo.reset()
