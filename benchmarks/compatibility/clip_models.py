"""open_clip's families: configs that differ in more than sizes, built small, without pretrained parts."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.compatibility.subject import BATCH, Subject
from benchmarks.compatibility.transformers_models import tiny_config

WIDTH, HEAD, LAYERS, TOKENS, VOCABULARY, IMAGE = 128, 32, 2, 16, 99, 64
# What configs of one family may differ in.
SIZES = set("""
    embed_dim layers width head_width heads patch_size image_size mlp_ratio context_length vocab_size tokenizer_kwargs
    hf_tokenizer_name timm_model_pretrained timm_drop timm_drop_path attn_pooler_heads attn_pooler_queries eos_id pad_id
    norm_kwargs act_kwargs timm_proj_bias""".split())  # fmt: skip
TOWERS = {"roberta": "roberta", "xlm": "xlm-roberta", "google/mt5": "mt5", "facebook/nllb": "m2m_100"}


def families() -> list[str]:
    """The config of the narrowest model of each family."""
    import open_clip

    found: dict[str, str] = {}
    configs = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
    for name in sorted(configs, key=lambda name: (configs[name]["embed_dim"], name)):
        found.setdefault(_kind(configs[name]), name)
    return sorted(found.values())


def _kind(config: dict[str, Any]) -> str:
    """What makes the family of a config, as text."""
    import timm

    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    vision["residual"] = isinstance(vision.get("layers"), list)
    if "timm_model_name" in vision:
        vision["timm_model_name"] = timm.model_entrypoint(vision["timm_model_name"]).__module__
    if "hf_model_name" in text:
        text["hf_model_name"] = _tower(text["hf_model_name"])
    parts = vision, text, config.get("multimodal_cfg", {}), {"custom": config.get("custom_text", False)}
    return json.dumps([{key: value for key, value in sorted(part.items()) if key not in SIZES} for part in parts])


def _tower(name: str) -> str:
    return next(kind for start, kind in reversed(TOWERS.items()) if name.startswith(start))


def build(name: str) -> Subject:
    """Build the family of the config `name` with small sizes; of timm's models only two blocks are kept."""
    import open_clip

    config = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    several = config.get("multimodal_cfg")
    config["embed_dim"] = WIDTH
    if isinstance(vision.get("layers"), list):
        vision |= {"layers": [1, 1, 1, 1], "width": 16, "head_width": HEAD, "image_size": IMAGE, "patch_size": None}
    elif "timm_model_name" not in vision:
        vision |= {
            "image_size": 4 * vision.get("patch_size", 16),
            "layers": LAYERS,
            "width": WIDTH,
            "head_width": HEAD,
            "attn_pooler_queries": TOKENS,
        }
    for part in (text, several or {}):
        part |= {"context_length": TOKENS, "vocab_size": VOCABULARY, "width": WIDTH, "heads": 4, "layers": LAYERS}
    with tempfile.TemporaryDirectory() as folder:
        if "hf_model_name" in text:
            tiny_config(_tower(text["hf_model_name"]), WIDTH).save_pretrained(folder)
            text |= {"hf_model_name": folder, "hf_model_pretrained": False}
        path = Path(folder) / "census.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        open_clip.add_model_config(path)
        model = open_clip.create_model("census", load_weights=False, pretrained_text=False)
    trunk: Any = getattr(model.visual, "trunk", None)
    if hasattr(trunk, "blocks"):
        trunk.blocks = trunk.blocks[:LAYERS]
    side = vision["image_size"]
    image, tokens = torch.randn(BATCH, 3, side, side), torch.randint(3, VOCABULARY, (BATCH, TOKENS))
    # Where the end of a text is looked for.
    tokens[:, -1] = text.get("eos_id", 2)
    return Subject(name, model, (image, tokens))
