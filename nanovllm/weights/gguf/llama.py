"""Llama, Mistral, Mixtral and Qwen in GGUF."""

from __future__ import annotations

import torch

from nanovllm.weights.gguf.config import Config, GGUFKeys, llama_like_config
from nanovllm.weights.gguf.family import Family, Undo


def _llama_config(keys: GGUFKeys) -> Config:
    """Mistral's files say "llama" too; but for a window the two are the same."""
    config = llama_like_config(keys)
    if experts := keys.count_if_any("expert_count"):
        return config | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": experts,
            "num_experts_per_tok": keys.count("expert_used_count"),
        }
    if window := keys.count_if_any("attention.sliding_window"):
        return config | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return config | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def _qwen2_config(keys: GGUFKeys) -> Config:
    return llama_like_config(keys) | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def _qwen3_config(keys: GGUFKeys) -> Config:
    return llama_like_config(keys) | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


def _qwen3_moe_config(keys: GGUFKeys) -> Config:
    config, active = llama_like_config(keys), keys.count("expert_used_count")
    return config | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": keys.count("expert_count"),
        "num_experts_per_tok": active,
        "moe_intermediate_size": keys.count("expert_feed_forward_length", config["intermediate_size"] // active),
        "norm_topk_prob": True,  # llama.cpp knows no other
    }


def _unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo the interleaving of rotary pairs: rows (head, pair, half) back to (head, half, pair)."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


UNPERMUTE: dict[str, Undo] = {
    "attn_q": lambda tensor, config: _unpermute(tensor, config["num_attention_heads"]),
    "attn_k": lambda tensor, config: _unpermute(tensor, config["num_key_value_heads"]),
}

DECODER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
LLAMA_NAMES = DECODER_NAMES | {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MIXTRAL_NAMES = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{e}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{e}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{e}.w2",
}
_QWEN3_MOE_NAMES = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
}

LLAMA = Family(_llama_config, LLAMA_NAMES | _MIXTRAL_NAMES, undo=UNPERMUTE)
QWEN2 = Family(_qwen2_config, LLAMA_NAMES)
QWEN3 = Family(_qwen3_config, LLAMA_NAMES)
QWEN3_MOE = Family(_qwen3_moe_config, LLAMA_NAMES | _QWEN3_MOE_NAMES)
