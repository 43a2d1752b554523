"""A GGUF file of a published shape, with random blocks of the types that llama.cpp's Q4_K_M gives each tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

_HALVES = {GGMLQuantizationType.Q4_K: (0, 2), GGMLQuantizationType.Q6_K: (208,)}
"""Where a block has fp16 numbers, which must be sane; all its other bytes may be anything."""


def write(config: dict[str, Any], path: Path) -> Path:
    """config: a Llama's config.json. Raises SystemExit for other families."""
    if config["model_type"] != "llama":
        raise SystemExit(f"--load-format gguf writes Llama's shapes, not {config['model_type']}'s")
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in _metadata(config).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    writer.add_tokenizer_model("no_vocab")
    random = np.random.default_rng(0)
    for name, shape, kind in _tensors(config):
        if kind is None:
            writer.add_tensor(name, np.ones(shape, np.float32))
        else:
            writer.add_tensor(name, _blocks(shape, kind, random), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(config: dict[str, Any]) -> dict[str, int | float]:
    return {
        "llama.vocab_size": config["vocab_size"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.key_length": config["head_dim"],
        "llama.attention.value_length": config["head_dim"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
    }


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], GGMLQuantizationType | None]]:
    """Names, shapes and types; the embedding is the head too. None: fp32, for norms."""
    q4, q6 = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    queries, keys = (config[f"num_{of}_heads"] * config["head_dim"] for of in ("attention", "key_value"))
    yield "token_embd.weight", (config["vocab_size"], hidden), q6
    yield "output_norm.weight", (hidden,), None
    for i in range(layers):
        # values and down projections of the first and last eighth and of each third layer between
        wider = q6 if i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2 else q4
        yield f"blk.{i}.attn_norm.weight", (hidden,), None
        yield f"blk.{i}.attn_q.weight", (queries, hidden), q4
        yield f"blk.{i}.attn_k.weight", (keys, hidden), q4
        yield f"blk.{i}.attn_v.weight", (keys, hidden), wider
        yield f"blk.{i}.attn_output.weight", (hidden, queries), q4
        yield f"blk.{i}.ffn_norm.weight", (hidden,), None
        yield f"blk.{i}.ffn_gate.weight", (inner, hidden), q4
        yield f"blk.{i}.ffn_up.weight", (inner, hidden), q4
        yield f"blk.{i}.ffn_down.weight", (hidden, inner), wider


def _blocks(shape: tuple[int, ...], kind: GGMLQuantizationType, random: np.random.Generator) -> np.ndarray:
    """uint8 [rows, bytes of a row]."""
    rows, cols = shape
    block, size = GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (rows * cols // block, size), dtype=np.uint8)
    for at in _HALVES[kind]:
        blocks[:, at : at + 2] = random.uniform(1e-5, 1e-4, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)
