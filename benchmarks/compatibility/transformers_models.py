"""transformers' architectures: from configs with tiny sizes, and what each is called with."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from benchmarks.compatibility.subject import BATCH, Subject, require_small

# By what they read and write.
ENCODERS = """
    albert bert big_bird camembert canine convbert data2vec-text deberta deberta-v2 distilbert electra ernie esm
    flaubert fnet ibert layoutlm longformer luke megatron-bert mobilebert modernbert mpnet nomic_bert
    nystromformer rembert roberta roformer splinter squeezebert xlm xlm-roberta xlnet"""
DECODERS = """
    biogpt bloom codegen cohere ctrl deepseek_v3 falcon falcon_mamba gemma gemma2 gemma3_text glm4 gpt2
    gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe jamba jetmoe lfm2 llama llama4_text mamba mistral
    mixtral mpt olmo2 olmoe opt phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next recurrent_gemma rwkv smollm3
    stablelm starcoder2 xglm"""
PAIRS = """
    bart bigbird_pegasus blenderbot fsmt led longt5 m2m_100 marian mbart mt5 pegasus plbart prophetnet
    switch_transformers t5 t5gemma umt5"""
VISION = """
    beit convnextv2 cvt data2vec-vision deit detr dinov2 dinov2_with_registers dinov3_vit dpt focalnet
    glpn hiera ijepa mobilevit poolformer pvt regnet resnet sam_vision_model segformer
    swiftformer swin swinv2 timesformer videomae vit vit_mae vit_msn vitdet vivit yolos"""
AUDIO = """
    audio-spectrogram-transformer data2vec-audio hubert moonshine sew speech_to_text unispeech wav2vec2
    wav2vec2-bert wav2vec2-conformer wavlm whisper"""
SEVERAL = """
    altclip blip chinese_clip clip clipseg flava groupvit
    llava owlvit paligemma siglip vilt visual_bert xclip"""
FAMILIES = " ".join((ENCODERS, DECODERS, PAIRS, VISION, AUDIO, SEVERAL)).split()

LENGTH, VOCABULARY, IMAGE, PATCH = 16, 99, 32, 8
IMAGE_TOKEN = VOCABULARY - 1
WIDTH, HEADS, LAYERS = 32, 4, 2
TINY: dict[str, int] = {
    **dict.fromkeys(
        "hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim embed_dim text_embed_dim "
        "hidden_dim kv_lora_rank q_lora_rank rnn_width lru_width".split(),
        WIDTH,
    ),
    **dict.fromkeys(
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
        "num_decoder_layers depth max_depth".split(),
        LAYERS,
    ),
    **dict.fromkeys(
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads".split(),
        HEADS,
    ),
    **dict.fromkeys("num_key_value_heads num_kv_heads".split(), HEADS // 2),
    **dict.fromkeys("head_dim d_kv d_head attention_head_size v_head_dim".split(), WIDTH // HEADS),
    **dict.fromkeys(
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner d_inner ffn_hidden_size "
        "dim_feedforward moe_intermediate_size shared_expert_intermediate_size intermediate_dim mlp_dim".split(),
        2 * WIDTH,
    ),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok top_k moe_top_k".split(), 2),
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "n_positions": 64, "image_size": IMAGE,
    "patch_size": PATCH, "projection_dim": 16, "n_ctx": 64, "max_seq_len": 64,
}  # fmt: skip
# What the names above do not shrink, or what does not go together by itself.
MORE: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 16},
    "codegen": {"rotary_dim": 4},
    "convnextv2": {"image_size": 64},
    "deepseek_v3": {"num_key_value_heads": HEADS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "hiera": {"image_size": [64, 64]},
    "llava": {"text_config": "llama", "vision_config": "clip_vision_model", "image_token_id": IMAGE_TOKEN},
    "mobilevit": {"image_size": 192},
    "paligemma": {
        "projection_dim": WIDTH,
        "text_config": "gemma",
        "vision_config": "siglip_vision_model",
        "image_token_id": IMAGE_TOKEN,
    },
    "speech_to_text": {"conv_channels": 64, "input_feat_per_channel": 80},
    "swin": {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "image_size": 64, "patch_size": 4},
    "swinv2": {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "image_size": 64, "patch_size": 4},
    "timesformer": {"num_frames": 2},
    "videomae": {"num_frames": 2},
    "vivit": {"num_frames": 2},
    "wav2vec2-bert": {"feature_projection_input_dim": 80},
    "whisper": {"max_source_positions": 32},
    "yolos": {"image_size": [32, 32]},
}


def tiny_config(model_type: str, width: int = WIDTH) -> Any:
    """A config of `model_type` with small sizes wherever it has a size of a known name."""
    from transformers import CONFIG_MAPPING

    values = _tiny(CONFIG_MAPPING[model_type], MORE.get(model_type, {}))
    widths = dict.fromkeys(values.keys() & {"hidden_size", "d_model"}, width)
    return CONFIG_MAPPING[model_type](**values | widths)


def _tiny(config: Any, more: dict[str, Any]) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    names = inspect.signature(config.__init__).parameters
    values: dict[str, Any] = {
        name: TINY[name] for name, field in names.items() if name in TINY and _is_size(field.default)
    }
    values |= dict.fromkeys({"pad_token_id", "bos_token_id"} & names.keys(), 1)
    values |= dict.fromkeys({"eos_token_id", "sep_token_id", "decoder_start_token_id"} & names.keys(), 2)
    values |= dict.fromkeys({"layerdrop", "encoder_layerdrop", "decoder_layerdrop"} & names.keys(), 0.0)
    values |= dict.fromkeys({"use_cache"} & names.keys(), False)
    for name, kind in more.items():
        if name.endswith("_config") and isinstance(kind, str):
            more = {**more, name: {"model_type": kind, **_tiny(CONFIG_MAPPING[kind], {})}}
    for name, part in (getattr(config, "sub_configs", None) or {}).items():
        if getattr(part, "model_type", None) and name in names:
            values[name] = _tiny(part, {}) | more.get(name, {})
    return values | {key: value for key, value in more.items() if not isinstance(value, dict) or key not in values}


def _is_size(default: Any) -> bool:
    return default is None or (isinstance(default, int) and not isinstance(default, bool))


def build(model_type: str) -> Subject:
    """Build the bare model of `model_type` and its inputs."""
    from transformers import AutoModel

    config = tiny_config(model_type)
    make: Any = AutoModel.from_config
    with torch.device("meta"):
        require_small(model_type, make(config))
    model = make(config)
    return Subject(type(model).__name__, model, named=_inputs(model, config))


def _inputs(model: Any, config: Any) -> dict[str, Tensor]:
    """What the forward asks for: tokens, images or sound."""
    names = inspect.signature(model.forward).parameters
    found: dict[str, Tensor] = {}
    ids = torch.randint(3, IMAGE_TOKEN, (BATCH, LENGTH))
    if getattr(config, "image_token_id", None) == IMAGE_TOKEN:
        places = torch.full((BATCH, (IMAGE // PATCH) ** 2), IMAGE_TOKEN)
        ids = torch.cat([places, ids], 1)
    vision = getattr(config, "vision_config", None) or config
    sides = getattr(vision, "image_size", 2 * IMAGE)
    sides = [sides] * 2 if isinstance(sides, int) else sides
    frames = [config.num_frames] if hasattr(config, "num_frames") else []
    if "pixel_values" in names:
        found["pixel_values"] = torch.randn(BATCH, *frames, getattr(vision, "num_channels", 3), *sides)
    if "input_ids" in names:
        found["input_ids"] = ids
    elif "input_values" in names:
        mel = [config.max_length, config.num_mel_bins] if hasattr(config, "num_mel_bins") else [4000]
        found["input_values"] = torch.randn(BATCH, *mel)
    if "input_features" in names:
        mel = [getattr(config, "num_mel_bins", 80), 64]
        last = config.model_type in ("speech_to_text", "wav2vec2-bert")
        found["input_features"] = torch.randn(BATCH, *(reversed(mel) if last else mel))
    if "decoder_input_ids" in names:
        found["decoder_input_ids"] = ids.flip(0)
    return found
