"""Gemma 3 in GGUF."""

from __future__ import annotations

import torch

from nanovllm.errors import WeightError
from nanovllm.weights.gguf.config import Config, GGUFKeys, llama_like_config
from nanovllm.weights.gguf.family import Family
from nanovllm.weights.gguf.llama import LLAMA_NAMES


def _config(keys: GGUFKeys) -> Config:
    config, window = llama_like_config(keys), keys.count_if_any("attention.sliding_window")
    layers = config["num_hidden_layers"]
    is_27b = layers == 62  # as llama.cpp tells it: the only size whose scale is not its head's
    return config | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": window or None,
        "layer_types": _layer_types(keys, layers) if window else ["full_attention"] * layers,
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": (
            config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
        ),
        "final_logit_softcapping": keys.value("final_logit_softcapping", None),
    }


def _layer_types(keys: GGUFKeys, layers: int) -> list[str]:
    """From a list of which layers slide, or the period whose last layer does not."""
    slides = keys.value("attention.sliding_window_pattern", 6)
    if not isinstance(slides, list):
        period = keys.count("attention.sliding_window_pattern", 6)
        slides = [layer % period < period - 1 for layer in range(layers)]
    if len(slides) != layers:
        raise WeightError(f"{keys.file.path}: sliding_window_pattern is for {len(slides)} layers of {layers}")
    return ["sliding_attention" if s else "full_attention" for s in slides]


def _minus_one(tensor: torch.Tensor, config: Config) -> torch.Tensor:
    """Gemma multiplies by 1 + weight, GGUF by the weight."""
    return tensor - 1


_NAMES = LLAMA_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

GEMMA3 = Family(_config, _NAMES, undo={name: _minus_one for name in _NAMES if name.endswith("norm")})
