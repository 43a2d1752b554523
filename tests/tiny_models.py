"""Small random models of every variant of every family, made by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers import byte_tokenizer

_GRANITE_HYBRID = {
    "model_type": "granitemoehybrid",
    "initializer_range": 0.2,  # with less, what a state remembers would not show in the logits
    "shared_intermediate_size": 53,
    "rms_norm_eps": 0.01,
    "embedding_multiplier": 3.5,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.6,
    "logits_scaling": 1.7,
}

TINY: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2},
    "llama3": {
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "tinyllama": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 131,
        "hidden_size": 60,
        "intermediate_size": 101,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "rms_norm_eps": 0.01,
        "vocab_size": 131,
        "hidden_size": 60,
        "intermediate_size": 101,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    },
    "qwen2-window": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2, "head_dim": 24},
    "qwen3-window": {
        "architectures": ["Qwen3ForCausalLM"],
        "rms_norm_eps": 0.01,
        "vocab_size": 131,
        "intermediate_size": 101,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 18,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "rms_norm_eps": 0.01,
        "model_type": "qwen3_moe",
        "vocab_size": 131,
        "intermediate_size": 101,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 18,
        "moe_intermediate_size": 36,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "qwen3-moe-window": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 20,
        "moe_intermediate_size": 36,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 2,
        "tie_word_embeddings": True,
    },
    "mistral-window": {
        "architectures": ["MistralForCausalLM"],
        "rms_norm_eps": 0.01,
        "vocab_size": 131,
        "hidden_size": 60,
        "intermediate_size": 101,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "sliding_window": 20,
    },
    "mistral-nemo": {
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 22,
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
    "ministral": {
        "architectures": ["MinistralForCausalLM"],
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 20,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "rms_norm_eps": 0.01,
        "vocab_size": 131,
        "hidden_size": 60,
        "intermediate_size": 44,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "sliding_window": 20,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
    },
    "granite": {
        "architectures": ["GraniteForCausalLM"],
        "rms_norm_eps": 0.01,
        "vocab_size": 131,
        "hidden_size": 60,
        "intermediate_size": 101,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "attention_bias": True,
        "mlp_bias": True,
        "embedding_multiplier": 3.5,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.6,
        "logits_scaling": 1.7,
    },
    "granitemoe": {
        "architectures": ["GraniteMoeForCausalLM"],
        "vocab_size": 131,
        "hidden_size": 48,
        "intermediate_size": 44,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "embedding_multiplier": 3.5,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.6,
        "logits_scaling": 1.7,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": True,
    },
    "granitemoe-shared": {
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "rms_norm_eps": 0.01,
        "intermediate_size": 44,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "embedding_multiplier": 3.5,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.6,
        "logits_scaling": 1.7,
        "num_local_experts": 7,
        "num_experts_per_tok": 3,
        "shared_intermediate_size": 53,
    },
    "granite-hybrid": {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        **_GRANITE_HYBRID,
        "vocab_size": 131,
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "position_embedding_type": "nope",
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "mamba_n_heads": 6,
        "mamba_d_state": 16,
        "tie_word_embeddings": True,
    },
    "granite-hybrid-rope": {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        **_GRANITE_HYBRID,
        "hidden_size": 60,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "attention_bias": True,
        "position_embedding_type": "rope",
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "mamba_n_heads": 10,
        "mamba_n_groups": 2,
        "mamba_d_state": 7,
        "mamba_d_conv": 3,
        "mamba_conv_bias": False,
        "mamba_proj_bias": True,
    },
    "granite-hybrid-moe": {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        **_GRANITE_HYBRID,
        "vocab_size": 131,
        "hidden_size": 48,
        "intermediate_size": 44,
        "num_attention_heads": 3,
        "position_embedding_type": "nope",
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "mamba_n_heads": 9,
        "mamba_n_groups": 3,
        "mamba_d_state": 16,
        "mamba_expand": 3,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "rms_norm_eps": 0.01,
        "model_type": "gemma3_text",
        "vocab_size": 131,
        "hidden_size": 60,
        "intermediate_size": 101,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 18,
        "query_pre_attn_scalar": 13,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "gemma3-untied": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "hidden_activation": "silu",
        "attention_bias": True,
        "sliding_window": 20,
        "sliding_window_pattern": 2,
        "tie_word_embeddings": False,
    },
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
    "gpt2-scaled": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_inner": 71,
        "layer_norm_epsilon": 0.01,
        "activation_function": "gelu",
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "tie_word_embeddings": False,
    },
    "gpt-neox": {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": 131,
        "hidden_size": 72,
        "num_attention_heads": 3,
    },
    "gpt-neox-sequential": {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_size": 60,
        "num_attention_heads": 6,
        "layer_norm_eps": 0.01,
        "hidden_act": "gelu_fast",
        "use_parallel_residual": False,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "linear",
            "factor": 2.0,
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.6,
        },
    },
    "mpt": {"architectures": ["MptForCausalLM"]},
    "mpt-clipped": {
        "architectures": ["MptForCausalLM"],
        "n_heads": 6,
        "layer_norm_epsilon": 0.01,
        "tie_word_embeddings": False,
        "attn_config": {"clip_qkv": 0.4, "softmax_scale": 0.7},
    },
    "falcon-rw-1b": {
        "architectures": ["FalconForCausalLM"],
        "hidden_size": 48,
        "num_attention_heads": 3,
        "multi_query": False,
        "parallel_attn": False,
        "alibi": True,
        "bias": True,
    },
    "falcon-7b": {
        "architectures": ["FalconForCausalLM"],
        "vocab_size": 131,
        "hidden_size": 60,
        "num_attention_heads": 5,
        "num_kv_heads": 5,
    },
    "falcon-40b": {
        "architectures": ["FalconForCausalLM"],
        "num_attention_heads": 8,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "layer_norm_epsilon": 0.01,
        "ffn_hidden_size": 101,
        "activation": "relu",
        "tie_word_embeddings": False,
    },
    "falcon-11b": {
        "architectures": ["FalconForCausalLM"],
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_kv_heads": 3,
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 1,
        "bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500042.0},
    },
}
_SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_OTHER_SIZES = {  # for families with other keys
    "gpt2": {"vocab_size": 131, "n_embd": 48, "n_layer": 3, "n_head": 3, "n_positions": 256},
    "mpt": {"vocab_size": 131, "d_model": 48, "n_layers": 3, "n_heads": 3, "max_seq_len": 256},
}


def make_tiny_model(family: str, path: Path, **overrides: Any) -> Path:
    """Save a small random model of the family with transformers, in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {**TINY[family], **overrides}
    default_type = options["architectures"][0].removesuffix("ForCausalLM").lower()
    model_type = options.pop("model_type", default_type)
    options = {**_OTHER_SIZES.get(model_type, _SIZES), **options}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options), dtype=torch.float32)
    for parameter in model.parameters():  # biases and norms too: zeros and ones would hide mistakes
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(path)
    return path


def make_chat_model(family: str, path: Path) -> Path:
    """Save a tiny model over bytes, with tokenizer and chat template."""
    make_tiny_model(family, path, vocab_size=258, bos_token_id=256, eos_token_id=257)
    byte_tokenizer().backend.save(str(path / "tokenizer.json"))
    template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}bot: {% endif %}"
    )
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path
