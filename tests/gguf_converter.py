"""From a Hugging Face directory to a GGUF file, by the rules of llama.cpp's convert_hf_to_gguf.py.

Names come from the gguf package's own table, so that ours are not tested against themselves.
llama.cpp (llama-cpp-python 0.3.36) loads such files of every family in test_gguf_families.py and
gives transformers' logits, to 1e-6, or to 1e-3 with its table for GELU.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from safetensors.numpy import load_file

Kind = GGMLQuantizationType


@contextmanager
def read_quickly() -> Iterator[None]:
    """The gguf package, and transformers with it, in a quarter of the time: each of the 400 000 slices of a header is
    costly as a memmap, and transformers asks for the table of names once a module."""
    memmap, table = np.memmap, functools.cache(gguf.get_tensor_name_map)
    plain = mock.patch("numpy.memmap", lambda *args, **options: memmap(*args, **options).view(np.ndarray))
    with plain, mock.patch("gguf.get_tensor_name_map", table):
        yield


ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "falcon": "falcon",
    "granite": "granite",
    "granitemoe": "granitemoe",
    "granitemoeshared": "granitemoe",
    "granitemoehybrid": "granitehybrid",
}
# rows of whole blocks of 32, and sizes that llama.cpp loads
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MAMBA = {"mamba_n_heads": 8, "mamba_expand": 2, "mamba_d_state": 32}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "llama3": SIZES | {"num_key_value_heads": 1},
    "tinyllama": SIZES,  # RoPE scaled linearly
    "mistral-window": SIZES,
    "mixtral": SIZES | {"sliding_window": None, "rms_norm_eps": 1e-5},
    "qwen2": SIZES | {"rope_parameters": YARN | {"attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0}},
    "qwen3": SIZES | {"head_dim": 32},
    "qwen3-moe": SIZES | {"head_dim": 32, "moe_intermediate_size": 32, "mlp_only_layers": []},
    "gemma3": SIZES | {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 7, "layer_types": None},
    "gpt2": {"n_embd": 64, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1},
    "falcon-7b": SIZES,
    "falcon-40b": SIZES | {"num_kv_heads": 2, "ffn_hidden_size": 160, "activation": "gelu"},
    "falcon-11b": SIZES | {"num_kv_heads": 2, "bias": False, "rope_parameters": None},
    "granite": SIZES,
    "granitemoe": SIZES,
    "granitemoe-shared": SIZES | {"shared_intermediate_size": 32},
    "granite-hybrid": SIZES | MAMBA | {"shared_intermediate_size": 96},
    "granite-hybrid-rope": SIZES | MAMBA | {"mamba_proj_bias": False, "shared_intermediate_size": 96},
    "granite-hybrid-moe": SIZES | MAMBA | {"mamba_n_groups": 2, "shared_intermediate_size": 64},
}
PERMUTED = {"llama", "granite", "granitemoe", "granitehybrid"}
ALWAYS_F32 = re.compile(r"norm\.weight$|ffn_gate_inp|ssm_conv1d|position_embd|(?<!\.weight)$")
SCALES_AT = {
    Kind.Q4_K: [0, 2],
    Kind.Q5_K: [0, 2],
    Kind.Q6_K: [208],
}  # of fp16 numbers in blocks that `quantize` cannot make


def convert(
    model: Path,
    path: Path,
    kind: Kind = Kind.F32,
    *,
    arch: str | None = None,
    tensors=None,
    kinds: dict[str, Kind] | None = None,
    **metadata: Any,
) -> Path:
    """Write `path`. tensors: more of them, as they are. kinds: of matrices whose name has the key
    in it. metadata: more or other keys, with __ for a dot and ARCH for the architecture."""
    config = json.loads((model / "config.json").read_text())
    arch = arch or ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, arch)
    keys = {f"{arch}.{key}": value for key, value in _hyperparameters(config).items()}
    for name in ("bos", "eos"):
        keys[f"tokenizer.ggml.{name}_token_id"] = config[f"{name}_token_id"]
    keys |= {key.replace("__", ".").replace("ARCH", arch): value for key, value in metadata.items()}
    for key, value in keys.items():
        _add(writer, key, value)
    random = np.random.default_rng(0)
    for name, values in _renamed(config, arch, load_file(model / "model.safetensors")):
        mine = next((other for part, other in (kinds or {}).items() if part in name), kind)
        data = values if ALWAYS_F32.search(name) or values.ndim == 1 else stored(values, mine, random)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=mine if data.dtype == np.uint8 else None)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(values: np.ndarray, kind: Kind, random: np.random.Generator) -> np.ndarray:
    """What a file holds for a matrix, row by row; of K-quants random bytes with sane scales."""
    if kind in (Kind.F32, Kind.F16):
        return values.astype(np.float32 if kind == Kind.F32 else np.float16)
    if kind not in SCALES_AT:
        return quantize(values, kind)
    block, size = GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (values.size // block, size), dtype=np.uint8)
    for at in SCALES_AT[kind]:
        blocks[:, at : at + 2] = random.uniform(1e-4, 1e-3, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Of each head, the two halves that rotate together are interleaved."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)


def _hyperparameters(config: dict[str, Any]) -> dict[str, Any]:
    """Without the architecture's prefix."""
    kind = config["model_type"]
    if kind == "gpt2":
        return {
            "context_length": config["n_positions"],
            "embedding_length": config["n_embd"],
            "feed_forward_length": config["n_inner"] or 4 * config["n_embd"],
            "block_count": config["n_layer"],
            "attention.head_count": config["n_head"],
            "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        }
    keys = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "attention.head_count": config["num_attention_heads"],
    }
    if kind == "falcon":
        return keys | {
            "feed_forward_length": config["ffn_hidden_size"],
            "attention.head_count_kv": _falcon_kv_heads(config),
            "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        }
    keys |= {
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        **_rope(config),
    }
    if config.get("head_dim"):
        keys |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    if kind in ("llama", "mistral", "mixtral") or kind.startswith("granite"):
        keys["rope.dimension_count"] = config.get("head_dim") or (
            config["hidden_size"] // config["num_attention_heads"]
        )
    if kind == "mistral":
        keys["attention.sliding_window"] = config["sliding_window"]
    if kind == "gemma3_text":
        keys["attention.sliding_window"] = config["sliding_window"]
    if "num_local_experts" in config:
        keys |= {"expert_count": config["num_local_experts"], "expert_used_count": config["num_experts_per_tok"]}
    if "moe_intermediate_size" in config:
        keys["expert_feed_forward_length"] = config["moe_intermediate_size"]
    return keys | (_granite(config) if kind.startswith("granite") else {})


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    full = rope.get("full_attention", rope)
    keys = {"rope.freq_base": full["rope_theta"]}
    if "sliding_attention" in rope:
        keys["rope.freq_base_swa"] = rope["sliding_attention"]["rope_theta"]
    if full["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": full["rope_type"], "rope.scaling.factor": full["factor"]}
    if full["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = full["original_max_position_embeddings"]
        names = {"attention_factor": "attn_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
        keys |= {f"rope.scaling.yarn_{name}": full[hf] for hf, name in names.items() if hf in full}
    return keys


def _granite(config: dict[str, Any]) -> dict[str, Any]:
    keys = {
        "attention.scale": config["attention_multiplier"],
        "embedding_scale": config["embedding_multiplier"],
        "residual_scale": config["residual_multiplier"],
        "logit_scale": config["logits_scaling"],
    }
    if config.get("shared_intermediate_size"):
        keys["expert_shared_feed_forward_length"] = config["shared_intermediate_size"]
    if config["model_type"] == "granitemoehybrid":
        is_attention = [kind != "linear_attention" for kind in config["layer_types"]]
        keys |= {
            "attention.head_count_kv": [config["num_key_value_heads"] if yes else 0 for yes in is_attention],
            "ssm.conv_kernel": config["mamba_d_conv"],
            "ssm.state_size": config["mamba_d_state"],
            "ssm.group_count": config["mamba_n_groups"],
            "ssm.inner_size": config["mamba_expand"] * config["hidden_size"],
            "ssm.time_step_rank": config["mamba_n_heads"],
            "rope.scaling.finetuned": config["position_embedding_type"] == "rope",
        }
        if config["position_embedding_type"] != "rope":
            keys["context_length"] = 2**20
    return keys


def _falcon_kv_heads(config: dict[str, Any]) -> int:
    return config["num_kv_heads"] if config["new_decoder_architecture"] else 1


def _renamed(config: dict[str, Any], arch: str, tensors: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    layers = config.get("num_hidden_layers") or config["n_layer"]
    number = next(
        number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config["model_type"]]
    )
    table = gguf.get_tensor_name_map(number, layers)
    for name, values in _merged_experts(tensors):
        if "input_linear" in name:
            stem = re.sub(r"model\.layers\.(\d+)\..*", r"blk.\1.", name)
            experts = "_exps" if "block_sparse" in name else "_shexp" if config["num_local_experts"] else ""
            gate, up = np.split(values, 2, axis=-2)
            yield f"{stem}ffn_gate{experts}.weight", gate
            yield f"{stem}ffn_up{experts}.weight", up
            continue
        if "shared_mlp.output" in name and not config["num_local_experts"]:
            yield re.sub(r"model\.layers\.(\d+)\..*", r"blk.\1.ffn_down.weight", name), values
            continue
        key = name.replace(".dt_bias", ".dt_proj.bias")
        new_name = table.get_name(key, try_suffixes=(".weight", ".bias"))
        assert new_name is not None, name
        yield new_name, _changed(config, arch, name, values)


def _merged_experts(tensors: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Those of one layer and matrix in one tensor, under the name of none."""
    for name, values in tensors.items():
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", name):
            before, expert, after = match.groups()
            if expert == "0":
                count = sum(other.startswith(f"{before}.") and other.endswith(f".{after}") for other in tensors)
                merged = np.stack([tensors[f"{before}.{e}.{after}"] for e in range(count)])
                yield f"{before}.{after}", merged
        else:
            yield name, values


def _changed(config: dict[str, Any], arch: str, name: str, values: np.ndarray) -> np.ndarray:
    if arch in PERMUTED and (match := re.search(r"\.([qk])_proj\.", name)):
        return permute(values, config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"])
    if arch == "gemma3" and name.endswith("norm.weight"):
        return values + 1
    if arch == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return values.T
    if "query_key_value" in name:
        heads, kv_heads = config["num_attention_heads"], _falcon_kv_heads(config)
        groups = values.reshape(kv_heads, heads // kv_heads + 2, config["hidden_size"] // heads, -1)
        parts = (groups[:, :-2], groups[:, [-2]], groups[:, [-1]])
        return np.concatenate([part.reshape(-1, values.shape[1]) for part in parts])
    if name.endswith(".A_log"):
        return -np.exp(values)[:, None]
    if name.endswith(".mamba.D"):
        return values[:, None]
    if name.endswith(".mamba.conv1d.weight"):
        return values.squeeze(1)
    if name.endswith(".mamba.norm.weight"):
        return values.reshape(config["mamba_n_groups"], -1)
    return values
