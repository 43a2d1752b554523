"""GPT-2 in GGUF."""

from __future__ import annotations

import torch

from nanovllm.weights.gguf.config import Config, GGUFKeys, common_config
from nanovllm.weights.gguf.family import Family


def _config(keys: GGUFKeys) -> Config:
    return common_config(keys) | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_positions": keys.count("context_length"),
        "n_embd": keys.count("embedding_length"),
        "n_layer": keys.count("block_count"),
        "n_head": keys.count("attention.head_count"),
        "n_inner": keys.count("feed_forward_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _to_conv1d(tensor: torch.Tensor, config: Config) -> torch.Tensor:
    """[out, in] to Conv1D's [in, out]; a bias stays as it is."""
    return tensor.t()


_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}

GPT2 = Family(
    _config,
    _NAMES,
    layer="transformer.h.{}",
    undo=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), _to_conv1d),
)
