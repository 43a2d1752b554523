"""Granite in GGUF: dense, mixture of experts, and hybrid with Mamba 2."""

from __future__ import annotations

from nanovllm.errors import ModelNotSupported, WeightError
from nanovllm.weights.gguf.config import Config, GGUFKeys, llama_like_config
from nanovllm.weights.gguf.family import Family, Undo
from nanovllm.weights.gguf.llama import DECODER_NAMES, LLAMA_NAMES, UNPERMUTE


def _dense_config(keys: GGUFKeys) -> Config:
    if not keys.value("rope.scaling.finetuned", True):  # llama.cpp's switch for RoPE
        raise ModelNotSupported(f"{keys.file.path}: architecture {keys.arch!r} without RoPE is not supported")
    config = llama_like_config(keys)
    return config | _multipliers(keys, config) | {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}


def _moe_config(keys: GGUFKeys) -> Config:
    shared = keys.count_if_any("expert_shared_feed_forward_length")
    kind = "GraniteMoeShared" if shared else "GraniteMoe"
    return _dense_config(keys) | {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "num_local_experts": keys.count("expert_count"),
        "num_experts_per_tok": keys.count("expert_used_count"),
        "shared_intermediate_size": shared,
    }


def _hybrid_config(keys: GGUFKeys) -> Config:
    """Converted files give 2**20 as their context, not what the model was trained with."""
    kv_heads = keys.value("attention.head_count_kv")  # of each layer; none is a Mamba layer
    is_list = isinstance(kv_heads, list) and all(isinstance(heads, int) and heads >= 0 for heads in kv_heads)
    if not is_list or len(kv_heads) != keys.count("block_count") or not any(kv_heads):
        raise WeightError(f"{keys.file.path}: attention.head_count_kv={kv_heads!r} names no key heads of each layer")
    config = llama_like_config(keys, num_kv_heads=max(kv_heads))
    return (
        config
        | _multipliers(keys, config)
        | _mamba_config(keys, config["hidden_size"])
        | {
            "architectures": ["GraniteMoeHybridForCausalLM"],
            "model_type": "granitemoehybrid",
            "layer_types": ["attention" if heads else "mamba" for heads in kv_heads],
            "position_embedding_type": "rope" if keys.value("rope.scaling.finetuned", True) else "nope",
            "shared_intermediate_size": keys.count("expert_shared_feed_forward_length", config["intermediate_size"]),
            "num_local_experts": keys.count_if_any("expert_count"),
            "num_experts_per_tok": keys.count_if_any("expert_used_count"),
        }
    )


def _mamba_config(keys: GGUFKeys, hidden_size: int) -> Config:
    inner, heads = keys.count("ssm.inner_size"), keys.count("ssm.time_step_rank")
    if inner % heads or inner % hidden_size:
        raise WeightError(f"{keys.file.path}: ssm.inner_size={inner} is no multiple of {heads} heads and {hidden_size}")
    return {
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_expand": inner // hidden_size,
        "mamba_n_groups": keys.count("ssm.group_count"),
        "mamba_d_state": keys.count("ssm.state_size"),
        "mamba_d_conv": keys.count("ssm.conv_kernel"),
        "mamba_conv_bias": keys.has_tensor(".ssm_conv1d.bias"),
        "mamba_proj_bias": keys.has_tensor(".ssm_in.bias"),
    }


def _multipliers(keys: GGUFKeys, config: Config) -> Config:
    return {
        "attention_multiplier": keys.number("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": keys.number("embedding_scale", 1.0),
        "residual_multiplier": keys.number("residual_scale", 1.0),
        "logits_scaling": keys.number("logit_scale", 1.0),
    }


_MOE_NAMES = DECODER_NAMES | {
    "ffn_gate_inp": "block_sparse_moe.router.layer",
    "ffn_gate_exps": "block_sparse_moe.input_linear",
    "ffn_down_exps": "block_sparse_moe.output_linear",
    "ffn_gate_shexp": "shared_mlp.input_linear",
    "ffn_down_shexp": "shared_mlp.output_linear",
}
_HYBRID_NAMES = _MOE_NAMES | {
    "ffn_gate": "shared_mlp.input_linear",  # of models without experts
    "ffn_down": "shared_mlp.output_linear",
    "ssm_in": "mamba.in_proj",
    "ssm_conv1d": "mamba.conv1d",
    "ssm_dt.bias": "mamba.dt_bias",
    "ssm_a": "mamba.A_log",
    "ssm_d": "mamba.D",
    "ssm_norm": "mamba.norm",
    "ssm_out": "mamba.out_proj",
}
_HALVES = {"ffn_gate_exps": "ffn_up_exps", "ffn_gate_shexp": "ffn_up_shexp", "ffn_gate": "ffn_up"}
_MAMBA: dict[str, Undo] = {
    "ssm_conv1d": lambda tensor, config: tensor.unsqueeze(1) if tensor.ndim == 2 else tensor,
    "ssm_a": lambda tensor, config: tensor.neg().log().flatten(),
    "ssm_d": lambda tensor, config: tensor.flatten(),
    "ssm_norm": lambda tensor, config: tensor.flatten(),
}

GRANITE = Family(_dense_config, LLAMA_NAMES, undo=UNPERMUTE)
GRANITE_MOE = Family(_moe_config, _MOE_NAMES, joined=_HALVES, undo=UNPERMUTE)
GRANITE_HYBRID = Family(_hybrid_config, _HYBRID_NAMES, joined=_HALVES, undo=UNPERMUTE | _MAMBA)
