"""The operator and the layer with `SLORA_BACKEND=triton`, end to end: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slora import backends, forms, ops, reference, room
from slora.dropout import kept, rescaling
from slora.layers import SelectiveLoRALinear

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
    K: int = 21,
    n: int = 12,
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


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "from gates"])
@pytest.mark.parametrize(("active", "lora"), [("none", "same"), ("some", "same"), ("some", "fp32"), ("all", "same")])
def test_output_and_every_gradient_agree_with_the_reference(
    dtype: torch.dtype, lora: str, active: str, listed: bool, device: torch.device, assert_as_exact_as: Any
) -> None:
    given = make(device, dtype, active=active, lora=torch.float32 if lora == "fp32" else None)
    dy = torch.randn(37, 36, device=device).to(dtype)
    found = ours(given, dy, active=ACTIVE[active] if listed else None)
    assert {name: t.dtype for name, t in found.items()} == {
        "y": dtype, **{name: given[name].dtype for name in NAMES}
    }  # fmt: skip
    compare(assert_as_exact_as, given, dy, found)


@pytest.mark.parametrize("form", ["fused", "accumulate", "addmm", "concat"])
@pytest.mark.parametrize(
    ("listed", "p"), [(True, 0.0), (False, 0.0), (True, 0.3)], ids=["listed", "from gates", "dropout"]
)
def test_every_form_computes_the_same(
    form: str,
    listed: bool,
    p: float,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    assert_as_exact_as: Any,
) -> None:
    taken = []

    def run(
        shape: forms.Shape, rows: Tensor, candidates: Callable[[], list[forms.Form]], compute: Callable[..., Any]
    ) -> Any:
        # addmm has no form of a masked input gradient, and dA, dB only where the host knows the active blocks; concat
        # none of a gradient.
        found = candidates()
        chosen = next((candidate for candidate in found if candidate.name == form), found[0])
        taken.append(chosen.name)
        return compute(chosen)

    monkeypatch.setattr(forms, "_run", run)
    given, seed = make(device, dtype), torch.tensor(7, device=device) if p else None
    if form == "concat":
        given["x"] = room.empty(37, 21, room=15, dtype=dtype, device=device).copy_(given["x"])
    mask = kept(37, 21, p, seed, torch.float64) * rescaling(p) if p else None
    dy = torch.randn(37, 36, device=device).to(dtype)
    found = ours(given, dy, active=[0, 2] if listed else None, dropout=p, seed=seed)
    compare(assert_as_exact_as, given, dy, found, mask)
    # Where the host does not know the active blocks, forms of cuBLAS are for exact products of fp32 alone.
    offered = listed or dtype == torch.float32 or form in ("fused", "accumulate")
    no_gradient = form == "concat" or (form == "addmm" and p)
    assert taken[:2] == [form if offered else "fused", "fused" if no_gradient or not offered else form]


def test_a_choice_among_all_forms_does_not_stand_where_some_are_no_candidates(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[dict[str, set[str]]] = []

    def run(shape: forms.Shape, rows: Tensor, candidates: Callable[[], list[forms.Form]], compute: Any) -> Any:
        chosen[-1][str(shape)] = {form.name for form in candidates()}
        return compute(candidates()[0])

    monkeypatch.setattr(forms, "_run", run)
    given, dy = make(device, torch.float16, active="all"), torch.randn(37, 36, device=device).half()
    for active in ([0, 1, 2], None):
        chosen.append({})
        ours(given, dy, active=active)
    assert len(chosen[0]) == len(chosen[1]) == 3
    assert not chosen[0].keys() & chosen[1].keys()
    assert "addmm" in set().union(*chosen[0].values())
    assert "addmm" not in set().union(*chosen[1].values())


def test_ranks_above_those_of_the_fused_kernel(device: torch.device, assert_as_exact_as: Any) -> None:
    given = make(device, torch.float32, (19,), K=80, n=80, r=70)
    dy = torch.randn(19, 240, device=device)
    compare(assert_as_exact_as, given, dy, ours(given, dy))


@pytest.mark.parametrize("p", [0.4])
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "from gates"])
def test_dropout_drops_in_the_backward_what_it_dropped_in_the_forward(
    p: float, listed: bool, dtype: torch.dtype, device: torch.device, assert_as_exact_as: Any
) -> None:
    given, seed = make(device, dtype), torch.tensor(77, device=device)
    mask = kept(37, 21, p, seed, torch.float64) * rescaling(p)
    dy = torch.randn(37, 36, device=device).to(dtype)
    found = ours(given, dy, active=[0, 2] if listed else None, dropout=p, seed=seed)
    compare(assert_as_exact_as, given, dy, found, mask)


def test_every_backend_drops_the_same_elements(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    given, seed = make(device, torch.float32), torch.tensor(5, device=device)
    dy = torch.randn(37, 36, device=device)
    found = {}
    for backend in ("triton", "torch", "reference"):
        monkeypatch.setenv("SLORA_BACKEND", backend)
        found[backend] = ours(given, dy, dropout=0.5, seed=seed)
    for backend in ("torch", "reference"):
        for name in NAMES:
            torch.testing.assert_close(found[backend][name], found["triton"][name], msg=f"{name} of {backend}")


@pytest.mark.parametrize("rows", [(), (1,), (2, 3), (0, 4), (2, 1, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_any_number_of_leading_dimensions(
    rows: tuple[int, ...], bias: bool, device: torch.device, assert_as_exact_as: Any
) -> None:
    given = make(device, torch.float32, rows, bias=bias)
    dy = torch.randn(*rows, 36, device=device)
    compare(assert_as_exact_as, given, dy, ours(given, dy))


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed batch": lambda: torch.randn(7, 3, 21).transpose(0, 1),
    "features last but not stride 1": lambda: torch.randn(3, 21, 7).transpose(1, 2),
    "every second feature": lambda: torch.randn(3, 7, 42)[..., ::2],
    "expanded": lambda: torch.randn(1, 7, 21).expand(3, 7, 21),
    "slice of tokens": lambda: torch.randn(3, 9, 21)[:, 1:8],
    "column-major matrix": lambda: torch.randn(21, 13).T,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_and_output_gradients_of_any_strides(layout: str, device: torch.device, assert_as_exact_as: Any) -> None:
    x = LAYOUTS[layout]().to(device)
    given = {**make(device, torch.float32, x.shape[:-1]), "x": x}
    shape = (*x.shape[:-1], 36)
    for dy in (torch.randn(shape), torch.randn(36).expand(shape), torch.ones(()).expand(shape)):
        compare(assert_as_exact_as, given, dy.to(device), ours(given, dy.to(device)))


ASKED_FOR = [("x",), ("lora_A",), ("lora_B",), ("gate",), ("x", "lora_A"), ("lora_A", "lora_B", "gate")]


@pytest.mark.parametrize("wanted", ASKED_FOR, ids="-".join)
def test_gradients_do_not_depend_on_which_others_are_asked_for(wanted: tuple[str, ...], device: torch.device) -> None:
    given = make(device, torch.float32)
    dy = torch.randn(37, 36, device=device)
    whole = ours(given, dy)
    some = {name: None if t is None else t.detach().requires_grad_(name in wanted) for name, t in given.items()}
    ops.selective_linear(**some, threshold=THRESHOLD, scaling=SCALING).backward(dy)
    for name in NAMES:
        if name in wanted:
            torch.testing.assert_close(some[name].grad, whole[name], msg=name)
        else:
            assert some[name].grad is None


def test_the_graph_keeps_only_x_and_S_besides_the_parameters(device: torch.device) -> None:
    given = make(device, torch.float32)
    leaves = {name: t.requires_grad_(name not in ("weight", "bias")) for name, t in given.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.selective_linear(**leaves, threshold=THRESHOLD, scaling=SCALING, active=[0, 2])
    parameters = {leaves[name].data_ptr() for name in NAMES if name != "x"}
    assert sorted(tuple(t.shape) for t in saved if t.data_ptr() not in parameters) == [(37, 10), (37, 21)]


def test_two_runs_give_the_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    given, seed = make(device, dtype), torch.tensor(1, device=device)
    dy = torch.randn(37, 36, device=device).to(dtype)
    one, two = (ours(given, dy, dropout=0.2, seed=seed) for _ in range(2))
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("gate_dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_gates_of_any_dtype_are_compared_in_it(gate_dtype: torch.dtype, device: torch.device) -> None:
    given = make(device, torch.float32)
    just_below = 0.1 - 1e-12 if gate_dtype == torch.float64 else 0.0999
    gate = torch.tensor([0.1, just_below, 0.2], dtype=gate_dtype, device=device)
    found = ours({**given, "gate": gate}, torch.ones(37, 36, device=device))
    assert found["gate"].dtype == gate_dtype
    on = (gate >= THRESHOLD).tolist()
    assert [bool(A.any()) for A in found["lora_A"]] == on


def test_what_the_kernels_do_not_take_is_computed_by_pytorch(device: torch.device) -> None:
    x, gates = torch.randn(2, 3, device=device), torch.zeros(65, device=device)
    assert backends.kernels_serve(x, gates[:64])
    assert not backends.kernels_serve(x, gates)
    assert not backends.kernels_serve(x.double(), gates[:1])
    given = make(device, torch.float64)
    compare_to = by_reference(given, torch.ones(37, 36, device=device).double(), torch.float64)
    found = ours(given, torch.ones(37, 36, device=device).double())
    torch.testing.assert_close(found["y"], compare_to["y"])


def layer_pair(device: torch.device, **settings: Any) -> SelectiveLoRALinear:
    layer = SelectiveLoRALinear(21, 36, **{"r": 4, "lora_alpha": 8, "blocks": 3, **settings})
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


@pytest.mark.parametrize("policy", ["exact", "probe", "frozen"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no dropout", "dropout"])
def test_a_layer_trains_with_the_gradients_of_the_torch_backend(
    policy: str, dropout: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_pair(device, inactive=policy, probe_rows=9, lora_dropout=dropout)
    x = torch.randn(5, 11, 21, device=device)
    found = run_layer(layer, x)
    monkeypatch.setenv("SLORA_BACKEND", "torch")
    for name, value in run_layer(layer, x).items():
        torch.testing.assert_close(found[name], value, msg=name, rtol=1e-4, atol=1e-4)
    # The inactive block's gate learns by the probe.
    assert bool(found["gate"][1]) == (policy != "frozen")


def test_activation_checkpointing_draws_the_same_mask_again(device: torch.device) -> None:
    layer = layer_pair(device, lora_dropout=0.4)
    x = torch.randn(13, 21, device=device)
    plain = run_layer(layer, x)
    again = run_layer(layer, x, lambda x: checkpoint(layer, x, use_reentrant=False))
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name


def test_autocast_gives_16_bit_outputs_and_fp32_gradients(device: torch.device) -> None:
    layer = layer_pair(device)
    x = torch.randn(13, 21, device=device)
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
        args = (torch.randn(6, 36, device=device), x[:m], A, B, gate, THRESHOLD, SCALING, None, 5)
        torch.library.opcheck(torch.ops.slora.gate_probe, args)
    torch.library.opcheck(torch.ops.slora.sample_rows, (x, 3, 5))


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
                for parameter in slora.gate.gates(block):
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
