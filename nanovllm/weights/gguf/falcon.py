"""Falcon in GGUF: the decoders with rotary positions, of 7B and the newer one of 40B, 180B and 11B."""

from __future__ import annotations

import torch

from nanovllm.weights.gguf.config import Config, GGUFKeys, common_config
from nanovllm.weights.gguf.family import Family


def _config(keys: GGUFKeys) -> Config:
    heads = keys.count("attention.head_count")
    kv_heads, two_norms = keys.count("attention.head_count_kv", heads), keys.has_tensor(".attn_norm_2.weight")
    return common_config(keys) | {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "hidden_size": keys.count("embedding_length"),
        "ffn_hidden_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "max_position_embeddings": keys.count("context_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "new_decoder_architecture": two_norms or kv_heads > 1,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "multi_query": True,
        "parallel_attn": True,
        "alibi": False,
        "bias": False,
    }


def _group_qkv(tensor: torch.Tensor, config: Config) -> torch.Tensor:
    """All queries, all keys, all values back to groups: the queries of one key, the key, the value."""
    heads, kv_heads = config["num_attention_heads"], config["num_kv_heads"]
    head_dim = config["hidden_size"] // heads
    parts = tensor.split((heads * head_dim, kv_heads * head_dim, kv_heads * head_dim))
    return torch.cat([part.unflatten(0, (kv_heads, -1)) for part in parts], dim=1).flatten(0, 1)


_NAMES = {
    "token_embd": "transformer.word_embeddings",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}

FALCON = Family(_config, _NAMES, layer="transformer.h.{}", undo={"attn_qkv": _group_qkv})
FALCON_TWO_NORMS = Family(
    _config,
    _NAMES | {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"},
    layer="transformer.h.{}",
    undo={"attn_qkv": _group_qkv},
)
