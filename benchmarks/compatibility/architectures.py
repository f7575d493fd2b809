"""Which architectures there are, and how a small model of each is built: random weights, small inputs."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from benchmarks.compatibility.checks import ModelUnderTest, Skip, linear_layers, parameter_count

TABLES: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SIZES = {field: entry["value"] for entry in TABLES["sizes"] for field in entry["fields"].split()}
BATCH, TOKENS, IMAGE_TOKEN = 2, 16, SIZES["vocab_size"] - 1
# Of a timm family with more models than MANY, those with such a name are not looked at.
LARGE = re.compile("base|large|huge|giant|gigantic|enormous|so[0-9]*m")
MANY = 10
CLIP_WIDTH, CLIP_LAYERS = 128, 2
# In parameters.
LARGEST = 150_000_000


def architectures() -> dict[str, list[str]]:
    """The families of each library."""
    import timm

    return {
        "timm": timm.list_modules(),
        "open_clip": TABLES["open_clip"].split(),
        "torchvision": TABLES["torchvision"].split(),
        "transformers": " ".join(TABLES["transformers"].values()).split(),
    }


def build(library: str, family: str) -> ModelUnderTest:
    """Build a small model of a family.

    Raises:
        Skip: it has more parameters than are tried.
    """
    builders = {"timm": _timm, "torchvision": _torchvision, "open_clip": _open_clip, "transformers": _transformers}
    torch.manual_seed(0)
    # Memory that a model leaves unwritten is NaN then, which can be told.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        built = builders[library](family)
    finally:
        torch.use_deterministic_algorithms(False)
    if (count := parameter_count(built.model)) > LARGEST:
        raise Skip(f"{built.name} has {count / 1e6:,.0f} M parameters; at most {LARGEST / 1e6:.0f} M are tried")
    return built


def _timm(family: str) -> ModelUnderTest:
    """The model with the fewest parameters, with linear layers if any has, in the first of several sizes that runs."""
    import timm

    names = timm.list_models(module=family)
    small = [name for name in names if not LARGE.search(name)] if len(names) > MANY else names
    found: dict[str, nn.Module] = {}
    for name in small or names:
        with torch.device("meta"), contextlib.suppress(Exception):
            found[name] = timm.create_model(name)
    name = min(found, key=lambda name: (not linear_layers(found[name]), parameter_count(found[name])))
    if not linear_layers(found[name]):
        return ModelUnderTest(name, found[name])
    default = timm.get_pretrained_cfg(name)
    # The size that the model is made for comes last.
    sides = (64, 112, 128, 224, default.input_size[-1] if default else 224)
    errors = []
    for side, depth, size in product(sides, ({"depth": 2}, {}), ("img_size", None)):
        options: dict[str, Any] = {**depth, **({size: side} if size else {})}
        try:
            torch.manual_seed(0)
            model = timm.create_model(name, **options).train()
            built = ModelUnderTest(name, model, (torch.randn(BATCH, 3, side, side),))
            built.outputs(model)
            return built
        except Exception as error:
            errors.append(error)
    raise errors[-1]


def _torchvision(name: str) -> ModelUnderTest:
    import torchvision

    side = 224 if name == "maxvit_t" else 64
    options = {"image_size": side} if name == "vit_b_16" else {}
    return ModelUnderTest(name, getattr(torchvision.models, name)(**options), (torch.randn(BATCH, 3, side, side),))


def _open_clip(name: str) -> ModelUnderTest:
    """The config `name` with small sizes, without pretrained parts; of a timm model it has two blocks."""
    import open_clip

    config = open_clip.get_model_config(name)
    config["embed_dim"] = CLIP_WIDTH
    vision, text = config["vision_cfg"], config["text_cfg"]
    if isinstance(vision.get("layers"), list):
        vision |= {"layers": [1, 1, 1, 1], "width": 16, "head_width": 32, "image_size": 64, "patch_size": None}
    elif "timm_model_name" not in vision:
        vision |= {"layers": CLIP_LAYERS, "width": CLIP_WIDTH, "head_width": 32, "attn_pooler_queries": TOKENS}
        vision["image_size"] = 4 * vision.get("patch_size", 16)
    for part in (text, config.get("multimodal_cfg") or {}):
        part |= {"layers": CLIP_LAYERS, "width": CLIP_WIDTH, "heads": 4, "context_length": TOKENS}
        part["vocab_size"] = SIZES["vocab_size"]
    with tempfile.TemporaryDirectory() as folder:
        if "hf_model_name" in text:
            towers = TABLES["text_towers"].items()
            tower = next(model_type for start, model_type in towers if text["hf_model_name"].startswith(start))
            _tiny_config(tower, CLIP_WIDTH).save_pretrained(folder)
            text |= {"hf_model_name": folder, "hf_model_pretrained": False}
        path = Path(folder) / "census.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        open_clip.add_model_config(path)
        model = open_clip.create_model("census", load_weights=False, pretrained_text=False)
    trunk: Any = getattr(model.visual, "trunk", None)
    if hasattr(trunk, "blocks"):
        trunk.blocks = trunk.blocks[:CLIP_LAYERS]
    images = torch.randn(BATCH, 3, vision["image_size"], vision["image_size"])
    tokens = torch.randint(3, SIZES["vocab_size"], (BATCH, TOKENS))
    # Where the end of a text is looked for.
    tokens[:, -1] = text.get("eos_id", 2)
    return ModelUnderTest(name, model, (images, tokens))


def _transformers(model_type: str) -> ModelUnderTest:
    """The bare model of `model_type`, from a config with small sizes."""
    from transformers import AutoModel

    config = _tiny_config(model_type)
    make: Any = AutoModel.from_config
    model = make(config)
    return ModelUnderTest(type(model).__name__, model, named_inputs=_transformers_inputs(model, config))


def _tiny_config(model_type: str, width: int = SIZES["hidden_size"]) -> Any:
    from transformers import CONFIG_MAPPING

    values = _tiny(CONFIG_MAPPING[model_type], TABLES["special"].get(model_type, {}))
    widths = dict.fromkeys(values.keys() & {"hidden_size", "d_model"}, width)
    return CONFIG_MAPPING[model_type](**values | widths)


def _tiny(config: Any, special: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a config class: sizes of known names, those of nested configs, and what is special to its type."""
    from transformers import CONFIG_MAPPING

    fields = inspect.signature(config.__init__).parameters
    values: dict[str, Any] = {
        name: SIZES[name]
        for name, field in fields.items()
        if name in SIZES and (field.default is None or type(field.default) is int)
    }
    values |= {name: value for name, value in TABLES["fixed"].items() if name in fields}
    for name, nested in (getattr(config, "sub_configs", None) or {}).items():
        if getattr(nested, "model_type", None) and name in fields:
            values[name] = _tiny(nested, {})
    for name, value in special.items():
        nested_type = isinstance(value, str) and name.endswith("_config")
        values[name] = {"model_type": value, **_tiny(CONFIG_MAPPING[value], {})} if nested_type else value
    return values


def _transformers_inputs(model: Any, config: Any) -> dict[str, Tensor]:
    """What the forward takes: tokens, images or sound."""
    arguments = inspect.signature(model.forward).parameters
    found: dict[str, Tensor] = {}
    ids = torch.randint(3, IMAGE_TOKEN, (BATCH, TOKENS))
    if getattr(config, "image_token_id", None) == IMAGE_TOKEN:
        patches = torch.full((BATCH, (SIZES["image_size"] // SIZES["patch_size"]) ** 2), IMAGE_TOKEN)
        ids = torch.cat([patches, ids], 1)
    if "pixel_values" in arguments:
        vision = getattr(config, "vision_config", None) or config
        sides = getattr(vision, "image_size", 2 * SIZES["image_size"])
        sides = [sides] * 2 if isinstance(sides, int) else sides
        frames = [config.num_frames] if hasattr(config, "num_frames") else []
        found["pixel_values"] = torch.randn(BATCH, *frames, getattr(vision, "num_channels", 3), *sides)
    if "input_ids" in arguments:
        found["input_ids"] = ids
    elif "input_values" in arguments:
        spectrogram = [config.max_length, config.num_mel_bins] if hasattr(config, "num_mel_bins") else [4000]
        found["input_values"] = torch.randn(BATCH, *spectrogram)
    if "input_features" in arguments:
        spectrogram = [getattr(config, "num_mel_bins", 80), 64]
        time_first = config.model_type in ("speech_to_text", "wav2vec2-bert")
        found["input_features"] = torch.randn(BATCH, *(reversed(spectrogram) if time_first else spectrogram))
    if "decoder_input_ids" in arguments:
        found["decoder_input_ids"] = ids.flip(0)
    return found
