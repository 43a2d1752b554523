"""Hugging Face's config from a GGUF file's metadata: typed look-ups, and what many families share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nanovllm.errors import ModelNotSupported, WeightError
from nanovllm.weights.gguf.file import GGUFFile

Config = dict[str, Any]
ROPE_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that Hugging Face keeps in the config."""


class GGUFKeys:
    """Values under the architecture's prefix; a WeightError names a key that is missing or absurd."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.arch = str(file.metadata.get("general.architecture"))

    def value(self, key: str, *default: Any) -> Any:
        full = f"{self.arch}.{key}"
        if full not in self.file.metadata and not default:
            raise WeightError(f"{self.file.path}: the GGUF metadata lacks {full!r}")
        return self.file.metadata.get(full, *default)

    def count(self, key: str, *default: int) -> int:
        value = self.value(key, *default)
        if not isinstance(value, int) or value < 1:
            raise WeightError(f"{self.file.path}: the GGUF metadata has {key}={value!r}, not a positive integer")
        return value

    def count_if_any(self, key: str) -> int:
        """0 where the key is absent, or says so."""
        return self.count(key) if self.value(key, 0) != 0 else 0

    def number(self, key: str, *default: float) -> float:
        """The shortest decimal with the same 32 bits: what stood in config.json."""
        value = self.value(key, *default)
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise WeightError(f"{self.file.path}: the GGUF metadata has {key}={value!r}, not a positive number")
        short = np.float32(value)
        return float(str(short)) if short == value else float(value)

    def token_id(self, name: str) -> int | None:
        token_id = self.file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None and not isinstance(token_id, int):
            raise WeightError(f"{self.file.path}: the GGUF metadata has {name}_token_id={token_id!r}")
        return token_id

    def has_tensor(self, end: str) -> bool:
        return any(name.endswith(end) for name in self.file.tensors)


def common_config(keys: GGUFKeys) -> Config:
    """What every family has."""
    embedding = keys.file.tensors.get("token_embd.weight")
    if embedding is None:
        raise WeightError(f"{keys.file.path} lacks the tensor token_embd.weight")
    ends = map(keys.token_id, ("eos", "eot", "eom"))  # end of sequence, of turn, of message
    return {
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in keys.file.tensors,
        "bos_token_id": keys.token_id("bos"),
        "eos_token_id": [i for i in ends if i is not None],
    }


def llama_like_config(keys: GGUFKeys, *, num_kv_heads: int | None = None) -> Config:
    """Of decoders with RMSNorm, RoPE and a gated MLP.

    num_kv_heads: where the file has a list of them.
    """
    hidden, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    rotary = keys.count("rope.dimension_count", keys.count("attention.key_length", hidden // heads))
    head_dim = keys.count("attention.key_length", rotary)
    if rotary != head_dim:
        raise ModelNotSupported(f"{keys.file.path}: RoPE over {rotary} of {head_dim} dimensions is not supported")
    return common_config(keys) | {
        "hidden_size": hidden,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": num_kv_heads or keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(keys, head_dim),
        "attention_bias": keys.has_tensor(".attn_q.bias"),
        "mlp_bias": keys.has_tensor(".ffn_up.bias"),
    }


def _rope_scaling(keys: GGUFKeys, head_dim: int) -> Config | None:
    tables = {name: _rope_table(keys, name, head_dim // 2) for name in ROPE_TABLES if name in keys.file.tensors}
    if "rope_freqs.weight" in tables:  # llama3 scaling, already worked out
        return {"rope_type": "factors", "factors": tables["rope_freqs.weight"]}
    # llama.cpp takes a factor without a type for linear; 0 stands for none, scale_linear is the old key
    kind = keys.value("rope.scaling.type", "linear")
    factor = keys.value("rope.scaling.factor", keys.value("rope.scale_linear", 0))
    if kind == "none" or (kind == "linear" and factor == 0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": keys.number("rope.scaling.factor", factor)}
    trained = keys.count("rope.scaling.original_context_length", keys.count("context_length"))
    scaling: Config = {"rope_type": kind, "original_max_position_embeddings": trained}
    if kind == "yarn":
        scaling["factor"] = keys.number("rope.scaling.factor")
        given = _given(
            keys, yarn_attn_factor="attention_factor", yarn_beta_fast="beta_fast", yarn_beta_slow="beta_slow"
        )
    elif kind == "longrope" and len(tables) == 2:
        scaling |= {"long_factor": tables[ROPE_TABLES[1]], "short_factor": tables[ROPE_TABLES[2]]}
        given = _given(keys, attn_factor="attention_factor")
    else:
        raise ModelNotSupported(f"{keys.file.path}: RoPE scaling {kind!r} with {len(tables)} tables is not supported")
    return scaling | given


def _given(keys: GGUFKeys, **names: str) -> Config:
    """Those of the optional numbers that are there, {GGUF's name: Hugging Face's}."""
    found = {hf: f"rope.scaling.{name}" for name, hf in names.items()}
    return {hf: keys.number(key) for hf, key in found.items() if keys.value(key, None) is not None}


def _rope_table(keys: GGUFKeys, name: str, length: int) -> list[float]:
    shape = keys.file.tensors[name].shape
    if shape != (length,):
        raise WeightError(f"{keys.file.path}: {name} is {shape}, should be {(length,)}")
    return keys.file.read(name).tolist()
