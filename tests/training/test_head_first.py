"""Head first: a linear probe on cached features, before the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import slora
from slora import ConfigError
from slora.layers import adapted_layers
from slora.training import TrainSettings, prepare, train
from slora.training.head_first import train_head

Factory = Callable[[], nn.Module]
Pair = tuple[Tensor, Tensor]


def test_only_the_head_moves_and_it_learns(make_model: Factory, data: Pair, settings: TrainSettings) -> None:
    model = prepare(make_model(), settings=settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        first = F.cross_entropy(model.eval()(data[0]), data[1])
    model.train()
    train_head(model, DataLoader(TensorDataset(*data), batch_size=16), 60, F.cross_entropy)
    assert model.training
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"head.weight", "head.bias"}
    with torch.no_grad():
        assert F.cross_entropy(model.eval()(data[0]), data[1]) < first
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_more_images_are_read_than_the_steps_need(make_model: Factory, data: Pair, settings: TrainSettings) -> None:
    model = prepare(make_model(), settings=settings)
    read = []

    def batches() -> Iterator[Pair]:
        for i in range(0, 64, 8):
            read.append(i)
            yield data[0][i : i + 8], data[1][i : i + 8]

    train_head(model, batches(), 3, F.cross_entropy)
    assert read == [0, 8, 16]


def test_no_batches_are_an_error(make_model: Factory, settings: TrainSettings) -> None:
    model = prepare(make_model(), settings=settings)
    with pytest.raises(ConfigError, match="nothing to train the head on"):
        train_head(model, [], 3, F.cross_entropy)


def test_a_run_starts_from_the_probed_head_and_a_resumed_one_does_not_probe_again(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: object
) -> None:
    settings = settings.replace(head_first=30, budget=1, max_steps=8, save_every=3, keep_last=9, lr=0.01)
    torch.manual_seed(1)
    model = prepare(make_model(), settings=settings)
    train(model, data, data, settings, f"{tmp_path}/whole")
    torch.manual_seed(1)
    other = prepare(make_model(), settings=settings)
    train(other, data, data, settings, f"{tmp_path}/more", resume=f"{tmp_path}/whole/checkpoints/step-00000003")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    torch.manual_seed(1)
    without = prepare(make_model(), settings=settings)
    train(without, data, None, settings.replace(head_first=0))
    assert not torch.equal(without.get_parameter("head.weight"), model.get_parameter("head.weight"))


def test_a_model_that_goes_on_after_its_head_is_refused(data: Pair, settings: TrainSettings) -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(16, 8), nn.Linear(8, 4)

        def forward(self, images: Tensor) -> Tensor:
            return 2 * self.head(self.body(images.flatten(1)))

    model = prepare(Doubled(), settings=settings)
    with pytest.raises(ConfigError, match=r"but Doubled computes more after 'head'; switch it off \(head_first=0\)"):
        train(model, data, None, settings.replace(head_first=3))


def test_the_only_module_that_is_trained_in_full_is_the_head_whatever_its_name(
    data: Pair, settings: TrainSettings
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    slora.inject(model, slora.SelectiveLoRAConfig(r=2, target_modules=["1"], modules_to_save=["3"]))
    before = model[3].weight.detach().clone()
    train_head(model, [data], 5, F.cross_entropy)
    assert not torch.equal(model[3].weight, before)


def test_a_model_without_a_head_is_refused(data: Pair, settings: TrainSettings) -> None:
    model = prepare(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), settings=settings.replace(modules_to_save=[]))
    with pytest.raises(ConfigError, match="one output head that is trained, but Sequential has none"):
        train(model, data, None, settings.replace(head_first=3))


def test_a_budget_with_retained_samples_resumes_bit_for_bit(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: object
) -> None:
    settings = settings.replace(budget=2, max_steps=9, save_every=4, keep_last=9, lr=0.05, gradient_accumulation=2)
    old = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    models = []
    for resume in (None, f"{tmp_path}/0/checkpoints/step-00000004"):
        torch.manual_seed(1)
        models.append(prepare(make_model(), settings=settings))
        folder = f"{tmp_path}/{len(models) - 1}"
        train(models[-1], data, data, settings, folder, resume=resume, retain=old)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert sum(len(layer.activity().active) for _, layer in adapted_layers(models[0])) == 2


def test_retained_samples_hold_the_features(make_model: Factory, data: Pair, settings: TrainSettings) -> None:
    settings = settings.replace(method="lora", max_steps=40, lr=0.05, r=2)
    old = torch.rand(16, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    drift = {}
    for weight in (0.0, 50.0):
        torch.manual_seed(1)
        model = prepare(make_model(), settings=settings)
        train(model, data, None, settings.replace(retain_weight=weight), retain=old)
        features = slora.models.features.final_features(model.eval())
        with torch.no_grad():
            after = features(old)
            with slora.disabled(model):
                drift[weight] = (after - features(old)).square().mean().item()
    assert drift[50.0] < 0.2 * drift[0.0]
