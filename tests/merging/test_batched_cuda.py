"""`batched_merge_` on a GPU: the bits of the CPU path in fp32, the bound of the tensor cores in 16 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slora.merging import batched_merge, batched_merge_, extension_info

BUILT = extension_info()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not BUILT.get("cuda"), reason="slora._C is not built with CUDA"),
]
NARROW = [torch.float32, torch.bfloat16, torch.float16]


def moved(value: Any) -> Any:
    return value.cuda() if isinstance(value, Tensor) else [moved(entry) for entry in value]


def random_call(dtype: torch.dtype, factor: torch.dtype, ranks: list[int], seed: int) -> dict[str, Any]:
    """Ragged and aligned weights, the first with one term of each rank on row slices that overlap."""
    torch.manual_seed(seed)
    shapes = [(300, 517), (256, 256), (1, 9), (77, 8)]
    weights = [(torch.randn(shape) * 0.1).to(dtype) for shape in shapes]
    As, Bs, rows = [], [], []
    for i, (N, K) in enumerate(shapes):
        mine = ranks if i == 0 else ranks[:1]
        As.append([torch.randn(r, K).to(factor) for r in mine])
        first = [0 if t == 0 else 10 * t for t in range(len(mine))]
        Bs.append([(torch.randn(N - start, r) * 0.1).to(factor) for start, r in zip(first, mine, strict=True)])
        rows.append(first)
    return {"weights": weights, "lora_As": As, "lora_Bs": Bs, "scales": [0.3] * len(shapes), "rows": rows}


def both(call: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    lists = {key: moved(call[key]) for key in ("weights", "lora_As", "lora_Bs")}
    return batched_merge(**call), [W.cpu() for W in batched_merge(**{**call, **lists})]


RANKS = [[1], [8], [16], [64], [128], [300], [5, 16, 11], [40, 16, 100]]


@pytest.mark.parametrize("factor", NARROW, ids=str)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_fp32_weights_get_the_bits_of_the_cpu(ranks: list[int], factor: torch.dtype) -> None:
    on_cpu, on_gpu = both(random_call(torch.float32, factor, ranks, sum(ranks)))
    for W, expected in zip(on_gpu, on_cpu, strict=True):
        assert torch.equal(W, expected)


@pytest.mark.parametrize("factor", NARROW, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("cancelled", [False, True])
def test_16_bit_weights_get_a_sum_within_the_bound_of_tensor_cores(
    cancelled: bool, ranks: list[int], dtype: torch.dtype, factor: torch.dtype, exact: Any
) -> None:
    call = random_call(dtype, factor, ranks, 1)
    if cancelled:  # shows the last bits of the sum, which rounding to 16 bits else hides
        zeros = [torch.zeros_like(W, dtype=torch.float32) for W in call["weights"]]
        call["weights"] = [-W.to(dtype) for W in batched_merge(**{**call, "weights": zeros})]
    _, on_gpu = both(call)
    for i, W in enumerate(on_gpu):
        updates = [
            exact.Update(A, B, 0.3, row)
            for A, B, row in zip(call["lora_As"][i], call["lora_Bs"][i], call["rows"][i], strict=True)
        ]
        by_hand, error = exact.bound(call["weights"][i], updates, more=10)
        low, high = exact.rounding_interval(by_hand, error, dtype)
        assert bool(((low <= W) & (high >= W)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [16, 40])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7FFFF000, 0x7F800001, -1, 0x7F800000], ids=hex)
def test_a_factor_that_is_not_finite_reaches_its_row_or_column(bits: int, rank: int, dtype: torch.dtype) -> None:
    odd = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for in_A in (True, False):
        W, A, B = torch.ones(40, 70, dtype=dtype), torch.ones(rank, 70), torch.ones(40, rank)
        (A[3:4, 2] if in_A else B[2:3, 3]).copy_(odd)
        merged = batched_merge([W.cuda()], [A.cuda()], [B.cuda()], [0.5])[0].cpu()
        reached = torch.zeros(40, 70, dtype=torch.bool)
        (reached[:, 2] if in_A else reached[2]).fill_(True)
        assert bool((merged[~reached] == 1 + rank / 2).all())
        assert not merged[reached].isfinite().any()
        assert bits == 0x7F800000 or bool(merged[reached].isnan().all())


def test_the_operator_itself_refuses_float64_before_it_does_anything() -> None:
    W, A, B = (torch.ones(8, 8, device="cuda") for _ in range(3))
    flat = ([1.0], [0], [0])
    for call in (([W.double()], [A], [B]), ([W], [A.double()], [B]), ([W], [A], [B.double()])):
        with pytest.raises(ValueError, match="float64 has no CUDA kernel"):
            torch.ops.slora.batched_merge_(*call, *flat, [])
        with pytest.raises(ValueError, match="float64 has no CUDA kernel"):
            torch.ops.slora.batched_merge(*call, *flat)
        assert bool((call[0][0] == 1).all())


def test_the_old_weights_are_kept_before_the_first_is_written() -> None:
    weights = [torch.randn(300, 64, device="cuda").to(dtype) for dtype in NARROW]
    before, kept = [W.clone() for W in weights], [torch.empty_like(W) for W in weights]
    A, B = torch.randn(2, 64, device="cuda"), torch.randn(300, 2, device="cuda")
    torch.ops.slora.batched_merge_(weights, [A] * 3, [B] * 3, [1.0] * 3, [0, 1, 2], None, kept)
    for W, old, copy in zip(weights, before, kept, strict=True):
        assert torch.equal(copy, old)
        assert not torch.equal(W, old)


def test_a_merge_in_place_writes_the_weights_and_nothing_else() -> None:
    whole = torch.randn(130, 300, device="cuda", dtype=torch.bfloat16)
    window = whole[3:120, 5:261]
    A, B = torch.randn(16, 256, device="cuda"), torch.randn(117, 16, device="cuda")
    expected = whole.clone()
    expected[3:120, 5:261] = batched_merge([window], [A], [B], [0.5])[0]
    batched_merge_([window], [A], [B], [0.5])
    assert torch.equal(whole, expected)


def test_it_runs_on_the_current_stream_without_waiting_for_it() -> None:
    W, A, B = torch.zeros(256, 256, device="cuda"), torch.ones(1, 256, device="cuda"), torch.ones(256, 1, device="cuda")
    batched_merge_([W], [A], [B], [1.0])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        W.fill_(5.0)
        batched_merge_([W], [A], [B], [1.0])
        assert not stream.query(), "the call has waited"
        merged = W.clone()
    stream.synchronize()
    assert bool((merged == 6).all())


def test_each_dtype_is_one_launch() -> None:
    weights = [torch.zeros(n, 64, device="cuda", dtype=dtype) for n in (3, 300) for dtype in NARROW]
    As, Bs = [torch.ones(2, 64, device="cuda")] * 6, [torch.ones(W.shape[0], 2, device="cuda") for W in weights]
    batched_merge_(weights, As, Bs, [1.0] * 6)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        batched_merge_(weights, As, Bs, [1.0] * 6)
        torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages() if "merge_kernel" in event.key) == 3


def test_capture_in_a_graph_is_refused_and_writes_nothing() -> None:
    W, A, B = torch.zeros(8, 8, device="cuda"), torch.ones(1, 8, device="cuda"), torch.ones(8, 1, device="cuda")
    with (
        pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        batched_merge_([W], [A], [B], [1.0])
    assert not W.any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_weights_device_is_used_whichever_is_current() -> None:
    W, A, B = (torch.ones(8, 8, device="cuda:1") for _ in range(3))
    batched_merge_([W], [A], [B], [1.0])
    assert bool((W == 9).all())


def test_a_large_weight_has_addresses_beyond_32_bits() -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    W = torch.zeros(2**21 + 3, 2048, device="cuda", dtype=torch.bfloat16)
    A, B = torch.ones(1, 2048, device="cuda"), torch.arange(W.shape[0], device="cuda").remainder(100).float()[:, None]
    batched_merge_([W], [A], [B], [1.0])
    assert torch.equal(W[-5:], B[-5:].expand(-1, 2048).bfloat16())
    assert torch.equal(W[:5], B[:5].expand(-1, 2048).bfloat16())
