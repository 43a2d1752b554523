"""From a config.json to one of a tiny model of the same family and of the same variant."""

from __future__ import annotations

from typing import Any

_LAYERS = 3
_HEADS = 4
_SIZES: dict[str, int] = {
    "vocab_size": 131,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), _HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "n_inner"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size", "shared_expert_intermediate_size"), 40),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts"), 5),
    "num_experts_per_tok": 2,
    "sliding_window": 20,  # shorter than the prompts, or it would not be seen
    "original_max_position_embeddings": 256,  # longer than the prompts: beyond it some scalings change
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
_TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers")
_DROPPED = ("quantization_config", "auto_map", "torch_dtype", "transformers_version", "_name_or_path")


def shrink_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config for a few thousand parameters that keeps every choice the family offers: kinds of
    layers, grouped or shared key/value heads, windows, biases, scalings of positions."""
    config = dict(config.get("text_config") or config)  # of a model that also sees
    small = {key: _SIZES.get(key, value) if value else value for key, value in config.items()}
    small |= _layers(config) | _heads(config)
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(config.get(key), dict):
            small[key] = _shrink_rope(config[key], small["head_dim"] if small.get("head_dim") else 64 // _HEADS)
    small |= {key: value for key, value in _TOKEN_IDS.items() if key in config}
    return {key: value for key, value in small.items() if key not in _DROPPED} | {"dtype": "float32"}


def _layers(config: dict[str, Any]) -> dict[str, Any]:
    """Few layers, one of every kind among them, in the order of the model."""
    count = next((config[key] for key in _LAYER_COUNTS if config.get(key)), 0)
    per_layer = {k: v for k, v in config.items() if isinstance(v, list) and v and len(v) == count}
    kept: dict[tuple, int] = {}
    for layer, kind in enumerate(zip(*per_layer.values(), strict=True)):
        kept.setdefault(tuple(map(str, kind)), layer)
    chosen = sorted(kept.values())
    chosen = sorted(chosen + [i for i in range(count) if i not in chosen][: max(0, _LAYERS - len(chosen))])
    small: dict[str, Any] = {key: len(chosen) for key in _LAYER_COUNTS if config.get(key)}
    small |= {key: [values[i] for i in chosen] for key, values in per_layer.items()}
    if config.get("sliding_window_pattern"):
        small["sliding_window_pattern"] = 2
    if (config.get("max_window_layers") or 0) > len(chosen):
        small["max_window_layers"] = 1
    if config.get("mlp_only_layers"):
        small["mlp_only_layers"] = [1]
    return small


def _heads(config: dict[str, Any]) -> dict[str, Any]:
    """As many key/value heads as query heads, one, or between, as it was; head_dim keeps its own way."""
    small: dict[str, Any] = {}
    heads = next((config[k] for k in ("num_attention_heads", "n_head", "n_heads") if config.get(k)), None)
    hidden = next((config[k] for k in ("hidden_size", "n_embd", "d_model") if config.get(k)), None)
    for key in ("num_key_value_heads", "num_kv_heads"):
        if config.get(key):
            small[key] = _HEADS if config[key] == heads else 1 if config[key] == 1 else _HEADS // 2
    if "head_dim" in config and heads and hidden:
        usual = config["head_dim"] in (None, hidden // heads)
        small["head_dim"] = 64 // _HEADS if usual else 24
    return small


def _shrink_rope(scaling: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Lengths and lists of factors; one dict for each kind of layer in some families."""
    if any(isinstance(value, dict) for value in scaling.values()):
        return {k: _shrink_rope(v, head_dim) if isinstance(v, dict) else v for k, v in scaling.items()}
    rotated = int(head_dim * scaling.get("partial_rotary_factor", 1.0))
    cut = {k: v[: rotated // 2] if isinstance(v, list) else v for k, v in scaling.items()}
    return {k: _SIZES.get(k, v) for k, v in cut.items()}
