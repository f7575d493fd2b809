"""The operator in PyTorch's own `opcheck` and in `torch.compile`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from slora import ops
from tests.ops.problem import NAMES, SCALING, THRESHOLD, leaves, make, name_of, trainable

pytestmark = pytest.mark.usefixtures("poisoned")


def samples() -> Iterator[Any]:
    for dtype, blocks, active, rows in (
        (torch.float32, 1, None, (5,)),
        (torch.float32, 3, [0, 2], (2, 3)),
        (torch.float32, 3, [], (4,)),
        (torch.float64, 4, None, (1,)),
        (torch.bfloat16, 3, None, (2, 3)),
        (torch.float32, 3, [0, 2], (0,)),
        (torch.float32, 1, [0], ()),
    ):
        lora_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        t = make(rows, blocks=blocks, dtype=dtype, lora_dtype=lora_dtype)
        if active is not None:
            t["gate"] = torch.tensor([0.15 if i in active else 0.05 for i in range(blocks)])
        yield pytest.param(t, active, id=f"{name_of(dtype)}-{blocks}-{active}-{rows}")


@pytest.mark.parametrize(("t", "active"), list(samples()))
def test_opcheck_of_the_forward(t: dict[str, Tensor], active: list[int] | None) -> None:
    args = tuple(trainable(("x", "lora_A", "lora_B", "gate"), t).values())
    torch.library.opcheck(torch.ops.slora.selective_linear, (*args, THRESHOLD, SCALING, active))


@pytest.mark.parametrize(("t", "active"), list(samples()))
@pytest.mark.parametrize("needs", [[True] * 4, [False, True, True, False], [False] * 4], ids=str)
def test_opcheck_of_the_backward(t: dict[str, Tensor], active: list[int] | None, needs: list[bool]) -> None:
    y, S = torch.ops.slora.selective_linear(*t.values(), THRESHOLD, SCALING, active)
    blocks = (t["lora_A"], t["lora_B"], t["gate"], THRESHOLD, SCALING, active)
    torch.library.opcheck(
        torch.ops.slora.selective_linear_backward,
        (torch.randn_like(y), t["x"], S, t["weight"], needs, *blocks),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_opcheck_with_dropout() -> None:
    args = tuple(trainable(("x", "lora_A", "lora_B", "gate"), make()).values())
    torch.library.opcheck(torch.ops.slora.selective_linear, (*args, THRESHOLD, SCALING, [0, 2], 0.3, torch.tensor(3)))


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no dropout", "dropout"])
def test_compiled_op_gives_the_same_output_and_gradients(dropout: float, assert_as_exact_as: Any) -> None:
    torch._dynamo.reset()
    seed = torch.tensor(9) if dropout else None

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(t: dict[str, Tensor]) -> Tensor:
        return ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING, dropout=dropout, seed=seed).square()

    t = make((17,))
    one, two = leaves(t), leaves(t)
    f(one).sum().backward()
    ops.selective_linear(
        **two, threshold=THRESHOLD, scaling=SCALING, dropout=dropout, seed=seed
    ).square().sum().backward()
    for name in NAMES:
        torch.testing.assert_close(one[name].grad, two[name].grad, msg=name)
    torch._dynamo.reset()


def test_compiled_op_serves_moving_gates_and_any_number_of_rows_with_few_graphs() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(
        lambda t: ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING), backend=counter, fullgraph=True
    )
    for M, gates in ((5, "all"), (5, "none"), (5, "some"), (7, "all"), (9, "none"), (123, "some")):
        t = make((M,), active=gates)
        wanted = ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING)
        torch.testing.assert_close(compiled(t), wanted)
    # One graph for 5 rows, one for any number of rows; none for the gates.
    assert counter.frame_count == 2
    torch._dynamo.reset()
