"""Fixtures of all tests: seeds, poisoned allocations, tolerances, and tiny models of every family."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.two_processes import TwoProcesses

# Triton decides when a kernel is defined, its own library of them when it is imported; so this stands before every test
# file. Without a GPU kernels run in Triton's interpreter on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Else torch.compile starts a pool of processes, each of which imports torch.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

# As in test files, a failing assert of these shows the values that it compared.
pytest.register_assert_rewrite("tests.models.adapting", "tests.adapters.damaged_adapters")

# Small models: several threads spend most of their time waiting for each other.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test the same random numbers and the default backend, whatever ran before it."""
    monkeypatch.delenv("SLORA_BACKEND", raising=False)
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill what `torch.empty` and its kin allocate with NaN, so that an element nobody wrote shows in the result.

    This is PyTorch's own switch; it reaches allocations inside operators, too.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True, scope="session")
def _signals() -> None:
    """Let Ctrl-C act as in a terminal: a shell starts jobs in the background with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def two_processes() -> TwoProcesses:
    """Return `run(function, *arguments)`: what `function(rank, *arguments)` returns in each of two processes."""
    return TwoProcesses()


@pytest.fixture
def assert_as_exact_as() -> Callable[..., None]:
    """Return `check(ours, eager, exact, what)`: |ours - exact| <= 2 |eager - exact| + floor, in the largest element.

    `eager` is the same mathematics in PyTorch calls in the dtype of `ours`, `exact` in a wider dtype. The floor is
    `eps * magnitude`, by default one unit in the last place of the largest element: where `eager` happens to be
    exact, ours may still round twice (the base product, then its sum with the update), half a unit each.

    A result that is one number, such as the gradient of a gate, says little about the error of the products that it is
    the sum of: `eager` may be exact by chance. It gives the number of `terms` of these products. If their running sums
    are rounded to the dtype of the result, as those of fp32 are, the roundings of n terms, whose running sum grows like
    the root of their number, add up to n / 2 times the variance of the last one: sqrt(1 + n / 2) times the floor. How
    many of them a BLAS has depends on the processor.
    """

    def check(
        ours: Tensor,
        eager: Tensor,
        exact: Tensor,
        what: str = "result",
        magnitude: float | None = None,
        terms: int = 0,
    ) -> None:
        assert ours.shape == exact.shape, f"{what} has shape {list(ours.shape)}, expected {list(exact.shape)}"
        assert ours.dtype == eager.dtype, f"{what} has dtype {ours.dtype}, eager PyTorch {eager.dtype}"
        assert ours.isfinite().all(), f"{what} is not finite everywhere"
        if not exact.numel():
            return
        wide = exact.double()
        error, allowed = (float((t.detach().double() - wide).abs().max()) for t in (ours, eager))
        magnitude = float(wide.abs().max()) if magnitude is None else magnitude
        floor = torch.finfo(eager.dtype).eps * magnitude * (1 + terms / 2) ** 0.5
        numbers = f"error {error:.3g}, eager PyTorch {allowed:.3g}, floor {floor:.3g}"
        assert error <= 2 * allowed + floor, f"{what}: {numbers}"

    return check


class Family(NamedTuple):
    """One model family: a builder, an example input, and what an adapter of it should find."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    run: Callable[..., Tensor]
    adapted: int
    """How many layers "all-linear" adapts."""
    head: tuple[str, ...]
    """Linear layers that are the output head."""


def _vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3,
        num_classes=5,
    )  # fmt: skip


def _convnext() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("convnext_tiny", pretrained=False, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5)


def _clip(**text: Any) -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 16},
        text_cfg={"context_length": 7, "vocab_size": 40, "width": 24, "heads": 3, "layers": 2, **text},
    )


def _bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def _llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def _tokens(*shape: int) -> Tensor:
    return torch.randint(1, 40, shape)


FAMILIES = {
    "timm-vit": Family(_vit, lambda: (torch.randn(2, 3, 16, 16),), lambda m, x: m(x), 8, ("head",)),
    "timm-convnext": Family(_convnext, lambda: (torch.randn(2, 3, 32, 32),), lambda m, x: m(x), 8, ("head.fc",)),
    "open_clip": Family(
        _clip,
        lambda: (torch.randn(3, 3, 16, 16), _tokens(3, 7)),
        lambda m, image, text: torch.cat([m.encode_image(image), m.encode_text(text)]),
        16,
        (),
    ),
    "bert": Family(_bert, lambda: (_tokens(2, 9),), lambda m, ids: m(ids).logits, 13, ("classifier",)),
    "llama": Family(_llama, lambda: (_tokens(2, 9),), lambda m, ids: m(ids).logits, 14, ("lm_head",)),
    "encoder": Family(_encoder, lambda: (torch.randn(3, 6, 16),), lambda m, x: m(x), 8, ()),
}


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    """Every model family in turn."""
    return FAMILIES[request.param]


@pytest.fixture
def families() -> dict[str, Family]:
    """All model families by name."""
    return FAMILIES


@pytest.fixture
def vit() -> nn.Module:
    """A ViT of timm: width 24, depth 2, 5 tokens, 5 classes, eight linear layers below its head."""
    return _vit()


@pytest.fixture
def make_mlp() -> Callable[..., nn.Module]:
    """Return a builder of a plain stack `fc0, act, fc1, act, ...` of linear layers of the widths given."""

    def build(*widths: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = nn.Sequential()
        for i, (k, n) in enumerate(itertools.pairwise(widths)):
            model.add_module(f"fc{i}", nn.Linear(k, n, bias=bias, dtype=dtype))
            model.add_module(f"act{i}", nn.Tanh())
        return model

    return build


@pytest.fixture
def randomise() -> Callable[..., nn.Module]:
    """Return `randomise(model, active)`: random B in every block, and gates that make the blocks `active` (a share)."""

    def change(model: nn.Module, active: float = 1.0, seed: int = 0) -> nn.Module:
        from slora.layers import adapted_layers

        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, layer in adapted_layers(model):
                layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.1)
                on = torch.rand(layer.gate.shape, generator=generator) < active
                layer.gate.copy_(torch.where(on, layer.threshold + 0.05, layer.threshold - 0.05))
        return model

    return change


@pytest.fixture
def image_tree(tmp_path: Path) -> Callable[..., Path]:
    """A factory of image folders: `count` images in two classes, the first ones damaged."""

    from PIL import Image

    def make(count: int, broken: int = 0, truncated: int = 0, where: str = "images") -> Path:
        root = tmp_path / where
        for number in range(count):
            folder = root / ("dark" if number % 2 else "light")
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{number:04d}.png"
            Image.new("RGB", (8, 8), (number % 256, 200 * (number % 2), 30)).save(path)
            if number < broken:
                path.write_bytes(b"this is no image")
            elif number < broken + truncated:
                path.write_bytes(path.read_bytes()[:-25])
        return root

    return make


@pytest.fixture
def slow_path() -> Iterator[None]:
    """PyTorch's attention as it runs in training; its fused inference kernels round differently."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Start and end without compiled graphs."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
