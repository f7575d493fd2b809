"""`import slora` needs torch, NumPy and safetensors, and nothing of its extras."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

EXTRAS = (
    "accelerate cli csrc jinja2 kernels matplotlib open_clip peft rich sklearn tensorboard timm torchmetrics "
    "torchvision transformers triton typer webdataset yaml"
).split()

# None in sys.modules is how Python itself says that a package cannot be imported.
BLOCK = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r}))\n"

# What needs torch is imported when it is first asked for; this asks for all of it.
ALL = "import slora; [getattr(slora, name) for name in slora.__all__]"


def run(code: str) -> str:
    """Run `code` in a new interpreter and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_core_works_where_nothing_but_torch_and_safetensors_is_installed(tmp_path: object) -> None:
    out = run(
        BLOCK
        + f"""
import torch, slora
from torch import nn
model = nn.Sequential(nn.Linear(6, 8), nn.MultiheadAttention(8, 2))
slora.inject(model, slora.SelectiveLoRAConfig(r=2, target_modules=["0", "1"]))
x = torch.randn(3, 6)
h = model[0](x)
loss = model[1](h, h, h)[0].sum() + slora.gate_penalty(model)
loss.backward()
torch.optim.AdamW(slora.parameter_groups(model)).step()
print(slora.summary(model))
slora.save_adapter(model, {str(tmp_path)!r})
slora.load_adapter(model, {str(tmp_path)!r})
slora.merge_and_unload(model)
print("done")
"""
    )
    assert out.endswith("done\n")


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    """The modules that all public names load beside those of torch."""
    code = f"import torch, sys, json; before = set(sys.modules); {ALL}; print(json.dumps([*set(sys.modules) - before]))"
    return set(json.loads(run(code)))


def parts(modules: set[str]) -> set[str]:
    return {name.split(".")[1] for name in modules if name.startswith("slora.")}


def test_importing_slora_loads_no_extra_package(loaded: set[str]) -> None:
    assert {name.partition(".")[0] for name in loaded} & set(EXTRAS) == set()


def test_importing_slora_loads_only_the_core(loaded: set[str]) -> None:
    assert parts(loaded) & {"cli", "training", "evaluation", "report", "demo", "kernels"} == set()


def test_importing_slora_does_not_import_torch() -> None:
    modules = "slora slora.config slora.training slora.sources.data_names slora.sources.model_names slora.cli"
    out = run(f"import sys, {', '.join(modules.split())}; print('torch' in sys.modules)")
    assert out == "False\n"


def test_names_are_found_in_whatever_order_modules_are_imported() -> None:
    out = run(
        """
import slora.models.inject, slora.training.trainable
import types
import slora
assert isinstance(slora.inject, types.FunctionType), slora.inject
assert isinstance(slora.reference, types.ModuleType), slora.reference
assert slora.merging.batched_merge_ and slora.ops.selective_linear
assert set(slora.__all__) <= set(dir(slora))
extra = {name for name in dir(slora) if not name.startswith("__")} - set(slora.__all__)
assert {"gates", "layers", "selection"} <= extra, extra
assert all(isinstance(getattr(slora, name), types.ModuleType) for name in extra if name in slora._PACKAGES), extra
assert not extra & {"Any", "ModuleType", "TYPE_CHECKING", "importlib", "sys", "types", "plain", "names"}, extra
for name in extra:
    __import__(f"slora.{name}")
from slora import *
from slora.training import *
import pickle
assert pickle.loads(pickle.dumps((inject, SelectiveLoRALinear))) == (slora.inject, slora.SelectiveLoRALinear)
assert train is slora.training.entry.train and Interrupted is slora.training.Interrupted
print(hasattr(slora, "injekt"), hasattr(slora.training, "trian"))
"""
    )
    assert out == "False False\n"


def test_training_and_evaluation_are_attributes_of_the_package_that_nothing_imports_before() -> None:
    out = run("import slora; print(slora.training.train_head.__name__, slora.evaluation.accuracy.__name__)")
    assert out == "train_head accuracy\n"
    out = run("import slora, sys; print(*(name for name in sys.modules if name.startswith('slora.')))")
    assert not {"slora.training", "slora.evaluation"} & set(out.split())


def test_an_adapted_layer_registers_the_operators() -> None:
    code = "import torch, slora; slora.SelectiveLoRALinear(4, 4, r=2, lora_alpha=2); ops = torch.ops.slora"
    assert run(f"{code}; print(ops.selective_linear, ops.selective_linear_backward)").split() == [
        "slora.selective_linear", "slora.selective_linear_backward",
    ]  # fmt: skip


def test_every_module_of_the_core_is_an_attribute_of_the_package(loaded: set[str]) -> None:
    import slora

    assert parts(loaded) <= {*slora._PACKAGES, "config", "errors"}
    assert set(slora._MODULE_OF) | {name for name in slora.__all__ if name in vars(slora)} == set(slora.__all__)


def test_every_public_name_is_there_and_documented() -> None:
    import slora

    assert sorted(slora.__all__) == list(slora.__all__)
    for name in slora.__all__:
        assert getattr(slora, name).__doc__, name


def test_every_error_is_also_the_builtin_that_one_would_expect() -> None:
    import slora

    expected = {
        slora.ConfigError: ValueError,
        slora.TargetError: ValueError,
        slora.ShapeError: ValueError,
        slora.StateError: RuntimeError,
        slora.CheckpointError: RuntimeError,
        slora.DataError: ValueError,
        slora.MissingDependencyError: ImportError,
        slora.NonFiniteLossError: FloatingPointError,
    }
    for error, builtin in expected.items():
        assert issubclass(error, slora.SLoRAError)
        assert issubclass(error, builtin)


def test_the_bound_of_setuptools_is_the_same_wherever_it_is_stated() -> None:
    root = Path(__file__).parents[1]
    bounds = {
        name: set(re.findall(r"setuptools>=([\d.]+)", (root / name).read_text(encoding="utf-8")))
        for name in ("pyproject.toml", "Makefile", "README.md", "setup.py")
    }
    assert bounds == {name: {"70.1"} for name in bounds}
    assert "version < (70, 1)" in (root / "setup.py").read_text(encoding="utf-8")
