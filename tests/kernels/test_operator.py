"""The operator and the layer with `SLORA_BACKEND=triton`, end to end: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slora import ops, reference
from slora.layers import SelectiveLoRALinear
from slora.ops.backends import triton
from slora.ops.dropout import keep_mask, rescaling
from slora.ops.operands import LoRAOperands

THRESHOLD, SCALING = 0.1, 1.7
NAMES = ("x", "weight", "bias", "lora_A", "lora_B", "gate")
ACTIVE = {"none": [], "some": [0, 2], "all": [0, 1, 2]}


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch, seeded: None) -> None:
    monkeypatch.setenv("SLORA_BACKEND", "triton")


def make(
    device: torch.device,
    dtype: torch.dtype,
    rows: tuple[int, ...] = (37,),
    K: int = 24,
    n: int = 16,
    r: int = 5,
    active: str = "some",
    lora: torch.dtype | None = None,
    bias: bool = True,
) -> dict[str, Tensor | None]:
    gate = torch.full((3,), 0.05)
    gate[ACTIVE[active]] = 0.15
    tensors = {
        "x": torch.randn(*rows, K).to(dtype),
        "weight": (torch.randn(3 * n, K) / math.sqrt(K)).to(dtype),
        "bias": torch.randn(3 * n).to(dtype) if bias else None,
        "lora_A": (torch.randn(3, r, K) / math.sqrt(K)).to(lora or dtype),
        "lora_B": (torch.randn(3, n, r) / math.sqrt(r)).to(lora or dtype),
        "gate": gate,
    }
    return {name: None if t is None else t.to(device) for name, t in tensors.items()}


def gradients(f: Callable[..., Tensor], given: dict[str, Tensor | None], dy: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of `f`."""
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in given.items()}
    y = f(**leaves)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), **{name: t.grad for name, t in leaves.items() if t is not None}}


def by_reference(
    given: dict[str, Tensor | None], dy: Tensor, dtype: torch.dtype, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """The same by `slora.reference`, computed in `dtype`; inactive gates get no gradient here."""

    def f(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, gate: Tensor) -> Tensor:
        x, weight, lora_A, lora_B = (t.to(dtype) for t in (x, weight, lora_A, lora_B))
        gate = torch.where(gate >= THRESHOLD, gate, gate.detach()).to(torch.float64 if dtype == torch.float64 else gate)
        bias = None if bias is None else bias.to(dtype)
        x_lora = None if mask is None else x * mask.to(dtype)
        y = reference.selective_lora_linear(x, weight, bias, lora_A, lora_B, gate, THRESHOLD, SCALING, x_lora)
        return y.to(dtype)

    wide = {name: None if t is None else t.to(dtype) if dtype == torch.float64 else t for name, t in given.items()}
    return gradients(f, wide, dy)


def compare(
    check: Callable[..., None],
    given: dict[str, Tensor | None],
    dy: Tensor,
    found: dict[str, Tensor],
    mask: Tensor | None = None,
) -> None:
    wanted = by_reference(given, dy, torch.float64, mask)
    rounded = by_reference(given, dy, given["x"].dtype, mask)
    for name, value in found.items():
        magnitude = float((wanted["lora_B"] * given["lora_B"].double()).square().sum((1, 2)).sqrt().max())
        if name == "gate":
            # One sum that cancels, of terms rounded to the dtype of x (S, T) and then added in that of the gate.
            low, own = (torch.finfo(t.dtype).eps for t in (given["x"], value))
            check(value, rounded[name], wanted[name], name, 5 * max(low / own, 1.0) * magnitude)
        else:
            check(value, rounded[name].to(value.dtype), wanted[name], name)


def ours(given: dict[str, Tensor | None], dy: Tensor, **more: Any) -> dict[str, Tensor]:
    return gradients(lambda **t: ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING, **more), given, dy)


@pytest.mark.parametrize("host_known", [True, False], ids=["host-known", "device-known"])
@pytest.mark.parametrize(("active", "lora"), [("none", "same"), ("some", "same"), ("some", "fp32"), ("all", "same")])
def test_output_and_every_gradient_agree_with_the_reference(
    dtype: torch.dtype, lora: str, active: str, host_known: bool, device: torch.device, assert_as_exact_as: Any
) -> None:
    given = make(device, dtype, active=active, lora=torch.float32 if lora == "fp32" else None)
    dy = torch.randn(37, 48, device=device).to(dtype)
    found = ours(given, dy, active=ACTIVE[active] if host_known else None)
    assert {name: t.dtype for name, t in found.items()} == {
        "y": dtype, **{name: given[name].dtype for name in NAMES}
    }  # fmt: skip
    compare(assert_as_exact_as, given, dy, found)


def test_forward_and_backward_may_take_different_forms(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, assert_as_exact_as: Any
) -> None:
    taken = []

    def choose(operation: triton.Operation, pinned: bool) -> triton.Algorithm:
        algorithms = operation.algorithms()
        wanted = {"forward": "precomputed", "input gradient": "cublas_before", "weight gradients": "one_pass"}
        taken.append(next(algorithm for algorithm in algorithms if algorithm.name == wanted[operation.key[0]]))
        return taken[-1]

    monkeypatch.setattr(triton, "_algorithm", choose)
    given, dy = make(device, torch.float16), torch.randn(37, 48, device=device).half()
    compare(assert_as_exact_as, given, dy, ours(given, dy, active=[0, 2]))
    assert [algorithm.name for algorithm in taken] == ["precomputed", "cublas_before", "one_pass"]


def test_eager_mode_and_graphs_are_told_apart(device: torch.device) -> None:
    given = make(device, torch.float16, active="all")
    A, B, gate = (given[name] for name in ("lora_A", "lora_B", "gate"))
    keys = {
        triton.Forward(given["x"], given["weight"], None, LoRAOperands(A, B, gate, THRESHOLD, SCALING, active)).key
        for active in ([0, 1, 2], None)
    }
    assert len(keys) == 2


def test_ranks_above_those_of_the_fused_kernel(device: torch.device, assert_as_exact_as: Any) -> None:
    given = make(device, torch.float32, (19,), K=80, n=80, r=70)
    dy = torch.randn(19, 240, device=device)
    compare(assert_as_exact_as, given, dy, ours(given, dy))


@pytest.mark.parametrize("p", [0.4])
@pytest.mark.parametrize("host_known", [True, False], ids=["host-known", "device-known"])
def test_dropout_drops_in_the_backward_what_it_dropped_in_the_forward(
    p: float, host_known: bool, dtype: torch.dtype, device: torch.device, assert_as_exact_as: Any
) -> None:
    given, seed = make(device, dtype), torch.tensor(77, device=device)
    mask = keep_mask(37, 24, p, seed, torch.float64) * rescaling(p)
    dy = torch.randn(37, 48, device=device).to(dtype)
    found = ours(given, dy, active=[0, 2] if host_known else None, dropout=p, seed=seed)
    compare(assert_as_exact_as, given, dy, found, mask)


def test_every_backend_drops_the_same_elements(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    given, seed = make(device, torch.float32), torch.tensor(5, device=device)
    dy = torch.randn(37, 48, device=device)
    found = {}
    for backend in ("triton", "torch", "reference"):
        monkeypatch.setenv("SLORA_BACKEND", backend)
        found[backend] = ours(given, dy, dropout=0.5, seed=seed)
    for backend in ("torch", "reference"):
        for name in NAMES:
            torch.testing.assert_close(found[backend][name], found["triton"][name], msg=f"{name} of {backend}")


@pytest.mark.parametrize(
    ("rows", "bias"), [((), True), ((1,), False), ((2, 3), True), ((0, 4), False), ((2, 1, 5), False)], ids=str
)
def test_any_number_of_leading_dimensions(
    rows: tuple[int, ...], bias: bool, device: torch.device, assert_as_exact_as: Any
) -> None:
    given = make(device, torch.float32, rows, bias=bias)
    dy = torch.randn(*rows, 48, device=device)
    compare(assert_as_exact_as, given, dy, ours(given, dy))


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed batch": lambda: torch.randn(7, 3, 24).transpose(0, 1),
    "features last but not stride 1": lambda: torch.randn(3, 24, 7).transpose(1, 2),
    "every second feature": lambda: torch.randn(3, 7, 48)[..., ::2],
    "expanded": lambda: torch.randn(1, 7, 24).expand(3, 7, 24),
    "slice of tokens": lambda: torch.randn(3, 9, 24)[:, 1:8],
    "column-major matrix": lambda: torch.randn(24, 13).T,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_and_output_gradients_of_any_strides(layout: str, device: torch.device, assert_as_exact_as: Any) -> None:
    x = LAYOUTS[layout]().to(device)
    given = {**make(device, torch.float32, x.shape[:-1]), "x": x}
    shape = (*x.shape[:-1], 48)
    of_dy = {"slice of tokens": torch.randn(48).expand(shape), "expanded": torch.ones(()).expand(shape)}
    dy = of_dy.get(layout, torch.randn(shape)).to(device)
    compare(assert_as_exact_as, given, dy, ours(given, dy))


ASKED_FOR = [("x",), ("lora_A",), ("lora_B",), ("gate",), ("x", "lora_A"), ("lora_A", "lora_B", "gate")]


def test_gradients_do_not_depend_on_which_others_are_asked_for(device: torch.device) -> None:
    given = make(device, torch.float32)
    dy = torch.randn(37, 48, device=device)
    whole = ours(given, dy)
    for wanted in ASKED_FOR:
        some = {name: None if t is None else t.detach().requires_grad_(name in wanted) for name, t in given.items()}
        ops.selective_linear(**some, threshold=THRESHOLD, scaling=SCALING).backward(dy)
        for name in NAMES:
            if name in wanted:
                torch.testing.assert_close(some[name].grad, whole[name], msg=f"{name} of {wanted}")
            else:
                assert some[name].grad is None, (name, wanted)


def test_the_graph_keeps_only_x_and_S_besides_the_parameters(device: torch.device) -> None:
    given = make(device, torch.float32)
    leaves = {name: t.requires_grad_(name not in ("weight", "bias")) for name, t in given.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.selective_linear(**leaves, threshold=THRESHOLD, scaling=SCALING, active=[0, 2])
    parameters = {leaves[name].data_ptr() for name in NAMES if name != "x"}
    assert sorted(tuple(t.shape) for t in saved if t.data_ptr() not in parameters) == [(37, 10), (37, 24)]


def test_two_runs_give_the_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    given, seed = make(device, dtype), torch.tensor(1, device=device)
    dy = torch.randn(37, 48, device=device).to(dtype)
    one, two = (ours(given, dy, dropout=0.2, seed=seed) for _ in range(2))
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("gate_dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_gates_of_any_dtype_are_compared_in_it(gate_dtype: torch.dtype, device: torch.device) -> None:
    given = make(device, torch.float32)
    just_below = 0.1 - 1e-12 if gate_dtype == torch.float64 else 0.0999
    gate = torch.tensor([0.1, just_below, 0.2], dtype=gate_dtype, device=device)
    found = ours({**given, "gate": gate}, torch.ones(37, 48, device=device))
    assert found["gate"].dtype == gate_dtype
    on = (gate >= THRESHOLD).tolist()
    assert [bool(A.any()) for A in found["lora_A"]] == on


NOT_SERVED: dict[str, dict[str, Any]] = {
    "K is no multiple of 8": {"K": 20},
    "n is no multiple of 8": {"n": 12},
    "no rows": {"rows": (0,)},
}


@pytest.mark.parametrize("case", NOT_SERVED)
def test_what_the_kernels_do_not_serve_is_computed_by_pytorch(
    case: str, device: torch.device, assert_as_exact_as: Any
) -> None:
    given = make(device, **{"dtype": torch.float16, **NOT_SERVED[case]})
    x, A, B, gate = (given[name] for name in ("x", "lora_A", "lora_B", "gate"))
    served = triton.Triton().supports
    assert not served(x, LoRAOperands(A, B, gate, THRESHOLD, SCALING))
    dy = torch.randn(*x.shape[:-1], given["weight"].shape[0], device=device).to(x.dtype)
    compare(assert_as_exact_as, given, dy, ours(given, dy))


def test_the_kernels_serve_16_bits_up_to_64_blocks_of_rank_256(device: torch.device) -> None:
    served = triton.Triton().supports

    def operands(blocks: int, r: int, active: list[int] | None = None) -> LoRAOperands:
        A, B = torch.empty(blocks, r, 24, device=device), torch.empty(blocks, 16, r, device=device)
        return LoRAOperands(A, B, torch.ones(blocks, device=device), THRESHOLD, SCALING, active)

    x = torch.zeros(2, 24, device=device)
    for dtype in (torch.float16, torch.bfloat16):
        assert served(x.to(dtype), operands(64, 256))
        assert served(x.to(dtype), operands(1, 1))
    # In the interpreter fp32 shows how exact the kernels are; on a GPU cuBLAS serves it.
    assert served(x, operands(1, 16)) == (device.type == "cpu")
    assert not served(x.double(), operands(1, 16))
    assert not served(x.half(), operands(65, 16))
    assert not served(x.half(), operands(1, 257))
    assert not served(x.half(), operands(3, 16, active=[]))


def layer_pair(device: torch.device, **settings: Any) -> SelectiveLoRALinear:
    layer = SelectiveLoRALinear(24, 48, **{"r": 4, "lora_alpha": 8, "blocks": 3, **settings})
    nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        layer.gate.copy_(torch.tensor([0.15, 0.05, 0.2]))
    return layer.to(device)


def run_layer(layer: SelectiveLoRALinear, x: Tensor, call: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    torch.manual_seed(3)
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = (call or layer)(x)
    y.float().square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize(("policy", "dropout"), [("exact", 0.0), ("probe", 0.3), ("probe", 0.0), ("frozen", 0.3)])
def test_a_layer_trains_with_the_gradients_of_the_torch_backend(
    policy: str, dropout: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_pair(device, inactive=policy, probe_rows=9, lora_dropout=dropout)
    x = torch.randn(5, 11, 24, device=device)
    found = run_layer(layer, x)
    monkeypatch.setenv("SLORA_BACKEND", "torch")
    for name, value in run_layer(layer, x).items():
        torch.testing.assert_close(found[name], value, msg=name, rtol=1e-4, atol=1e-4)
    # The inactive block's gate learns by the probe.
    assert bool(found["gate"][1]) == (policy != "frozen")


def test_activation_checkpointing_draws_the_same_mask_again(device: torch.device) -> None:
    layer = layer_pair(device, lora_dropout=0.4)
    x = torch.randn(13, 24, device=device)
    plain = run_layer(layer, x)
    again = run_layer(layer, x, lambda x: checkpoint(layer, x, use_reentrant=False))
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name


def test_autocast_gives_16_bit_outputs_and_fp32_gradients(device: torch.device) -> None:
    layer = layer_pair(device)
    x = torch.randn(13, 24, device=device)
    with torch.autocast(device.type, torch.float16):
        found = run_layer(layer, x)
    assert found.pop("y").dtype == torch.float16
    assert {value.dtype for value in found.values()} == {torch.float32}
    wide = run_layer(layer, x)
    for name, value in found.items():
        # Everything was rounded to fp16 once, and most of it a few times.
        torch.testing.assert_close(value, wide[name], rtol=0.02, atol=0.02 * float(wide[name].abs().max()), msg=name)


def test_opcheck_of_the_kernels(device: torch.device) -> None:
    given = make(device, torch.float32, (6,))
    leaves = [t.requires_grad_(name not in ("weight", "bias")) for name, t in given.items()]
    for active in (None, [0, 2]):
        torch.library.opcheck(torch.ops.slora.selective_linear, (*leaves, THRESHOLD, SCALING, active))
    x, gate = given["x"].detach(), given["gate"].detach()
    A, B = (given[name].detach() for name in ("lora_A", "lora_B"))
    for m in (6, 3):
        args = (torch.randn(6, 48, device=device), x[:m], A, B, gate, THRESHOLD, SCALING, None, 5, None)
        torch.library.opcheck(torch.ops.slora.gate_probe, args)
    torch.library.opcheck(torch.ops.slora.sample_rows, (x, 3, 5, None))


# What only a GPU can show.


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_a_compiled_vit_block_keeps_one_graph_while_gates_move(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    timm = pytest.importorskip("timm")
    import slora

    monkeypatch.setenv("SLORA_BACKEND", backend)
    monkeypatch.setenv("SLORA_CACHE", str(tmp_path))
    # Poisoning asks for deterministic algorithms, under which nothing is measured.
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    block = timm.models.vision_transformer.Block(64, 4).cuda()
    slora.inject(block, slora.SelectiveLoRAConfig(r=4, lora_dropout=0.1, inactive="exact"))
    compiled = torch.compile(block, fullgraph=True)
    x = torch.randn(2, 17, 64, device="cuda", requires_grad=True)
    # Training and evaluation are a graph each.
    compiled(x).sum().backward()
    block.eval()
    compiled(x)
    block.train()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for gate in (0.15, 0.0, 0.15):
            with torch.no_grad():
                for parameter in slora.gates.gates(block):
                    parameter[0] = gate
            block.eval()
            torch.testing.assert_close(compiled(x), block(x), rtol=1e-3, atol=1e-3)
            block.train()
            compiled(x).sum().backward()
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no dropout", "dropout"])
def test_a_cuda_graph_replays_with_moved_gates_and_new_masks(dropout: float) -> None:
    made = make(torch.device("cuda"), torch.bfloat16, lora=torch.float32)
    given = {name: t.requires_grad_(name not in ("weight", "bias")) for name, t in made.items()}
    leaves = [t for t in given.values() if t.requires_grad]

    def step() -> tuple[Tensor, ...]:
        seed = torch.randint(2**62, (), device="cuda") if dropout else None
        y = ops.selective_linear(**given, threshold=THRESHOLD, scaling=SCALING, dropout=dropout, seed=seed)
        return y, *torch.autograd.grad(y.float().square().sum(), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seen = []
    for gates in ([0.15, 0.05, 0.15], [0.05, 0.05, 0.05], [0.2, 0.2, 0.2]):
        with torch.no_grad():
            given["gate"].copy_(torch.tensor(gates))
        graph.replay()
        if not dropout:
            for one, two in zip(captured, step(), strict=True):
                assert torch.equal(one, two)
        seen.append(captured[0].clone())
    graph.replay()
    assert torch.equal(captured[0], seen[-1]) == (dropout == 0.0)
