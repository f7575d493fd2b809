"""Retention: the term is what its formula says, and it holds features where they were."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import slora
from slora import ConfigError
from slora.layers import adapted_layers
from slora.retention import Distillation, generic_samples


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


def adapted() -> Net:
    torch.manual_seed(2)
    model = slora.inject(Net(), slora.SelectiveLoRAConfig(r=2, modules_to_save=["head"]))
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.lora_B.normal_(std=0.3)
    return model


def samples(n: int = 10) -> Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(4))


def test_the_term_is_the_drift_as_a_share_of_the_variance() -> None:
    model, z = adapted(), samples()
    term = Distillation(model, z, weight=3.0, batch_size=10, every=1)()
    torch.manual_seed(2)
    plain = Net()
    plain.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "lora" not in name and "gate" not in name}
    )
    before, after = plain.body(z), model.body(z)
    variance = ((before - before.mean(0)) ** 2).sum() / 10
    torch.testing.assert_close(term, 3.0 * ((after - before) ** 2).sum() / 10 / variance, rtol=1e-5, atol=1e-6)


def test_its_gradient_brings_the_features_back() -> None:
    model, z = adapted(), samples()
    keep = Distillation(model, z, every=1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    first = keep().item()
    for _ in range(60):
        optimizer.zero_grad()
        keep().backward()
        optimizer.step()
    assert keep().item() < 0.1 * first


def test_at_the_start_it_is_zero_and_between_its_steps_it_costs_nothing() -> None:
    model = slora.inject(Net(), slora.SelectiveLoRAConfig(r=2))
    calls = []
    keep = Distillation(model, samples(), every=3)
    model.body.register_forward_hook(lambda *_: calls.append(1))
    assert [keep().item() for _ in range(6)] == [0.0] * 6
    assert len(calls) == 2


def test_every_sample_has_its_turn_and_a_step_has_its_samples() -> None:
    keep = Distillation(adapted(), samples(), batch_size=5, every=2, seed=1)
    rows = [keep._rows(draw).tolist() for draw in range(4)]
    assert sorted(rows[0] + rows[1]) == sorted(rows[2] + rows[3]) == list(range(10))
    assert keep(4).item() == keep(4).item()
    assert keep(5).item() == 0.0


def test_dropout_is_no_drift() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, drop_path_rate=0.5, proj_drop_rate=0.3)
    slora.inject(vit, slora.SelectiveLoRAConfig(r=2))
    assert Distillation(vit.train(), torch.randn(4, 3, 32, 32), every=1)().item() == 0.0
    assert all(module.training for module in vit.modules())


def test_the_mode_of_the_model_is_left_alone() -> None:
    model = adapted()
    model.body[1].eval()
    Distillation(model, samples())
    assert model.training
    assert not model.body[1].training


def test_models_of_timm_and_others_offer_their_features() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    slora.inject(vit, slora.SelectiveLoRAConfig(r=2))
    keep = Distillation(vit, torch.randn(4, 3, 32, 32))
    assert keep.base.shape == (4, 192)
    nothing = slora.inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), slora.SelectiveLoRAConfig(r=2))
    with pytest.raises(ConfigError, match="nor a single output head"):
        Distillation(nothing, samples())
    body = nothing[0]
    assert Distillation(nothing, samples(), features=lambda x: body(x)).base.shape == (10, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": samples(1)}, "samples holds 1 samples, fewer than 2"),
        ({"samples": [1, 2]}, "samples are a list, not a tensor"),
        ({"weight": -1.0}, "weight=-1.0"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"every": 0}, "every=0"),
        ({"every": 2.5}, "every=2.5"),
        ({"weight": "a"}, "weight='a'"),
        ({"features": 3}, "features=3 is not a function"),
        ({"features": lambda x: x.unflatten(1, (2, 4))}, r"features have shape \[10, 2, 4\], expected \[n, d\]"),
    ],
)
def test_bad_input_is_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Distillation(adapted(), **({"samples": samples()} | arguments))  # type: ignore[arg-type]


def test_generic_samples_are_noise_and_shuffled_patches() -> None:
    images = (
        torch.rand(3, 2, 9, 8, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 5.0])[:, None, None]
    )
    made = generic_samples(images, 40, patch=4)
    assert made.shape == (40, 2, 9, 8)
    noise, shuffled = made[:20], made[20:]
    torch.testing.assert_close(noise.mean((0, 2, 3)), images.mean((0, 2, 3)), atol=0.1, rtol=0)
    torch.testing.assert_close(noise.std((0, 2, 3)), images.std((0, 2, 3)), atol=0.1, rtol=0)
    for sample in shuffled:
        of = [image for image in images if torch.equal(image[:, 8:], sample[:, 8:])]
        assert len(of) == 1
        assert torch.equal(sample.flatten().sort().values, of[0].flatten().sort().values)
        patches = [of[0][:, i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)]
        assert any(torch.equal(sample[:, :4, 4:8], patch) for patch in patches)
    assert any(not torch.equal(sample, image) for sample in shuffled for image in images)
    assert torch.equal(made, generic_samples(images, 40, patch=4))


@pytest.mark.parametrize(("shape", "patch"), [((3, 9, 8), 4), ((0, 1, 8, 8), 4), ((2, 1, 8, 8), 9), ((2, 1, 8, 8), 0)])
def test_generic_samples_refuse_what_is_no_image(shape: tuple[int, ...], patch: int) -> None:
    with pytest.raises(ConfigError, match=r"images of shape|patch="):
        generic_samples(torch.rand(shape), 4, patch=patch)
