"""Where the weights come from: files that every engine can read, or a published shape with random ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Model:
    """paths: see benchmarks.workload.Job. config: of config.json. random: the files hold no weights."""

    name: str
    paths: dict[str, str]
    config: dict[str, Any]
    random: bool


def unquantized(path: str) -> dict[str, str]:
    """nanovllm's option for a file that it would compute with as it is: benchmarks have one dtype for all engines."""
    return {"quantization": "dequantize"} if path.endswith(".gguf") else {}


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
        **more,
    }


def _granite_h(hidden: int, inner: int, layers: int, attention: tuple[int, ...], head_dim: int) -> dict[str, Any]:
    """attention: which layers have it; the others are Mamba2's, with heads of this size."""
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        **_llama(hidden, inner, layers, 12, 4, 100352, position_embedding_type="nope"),
        "layer_types": ["attention" if i in attention else "mamba" for i in range(layers)],
        "shared_intermediate_size": inner,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "mamba_n_heads": 48,
        "mamba_d_head": head_dim,
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
    }


def _qwen3(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    options = {"head_dim": 128, "rope_theta": 1e6, "attention_bias": False, **more}
    sizes = _llama(hidden, inner, layers, heads, 8, 151936, **options)
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **sizes}


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, tie_word_embeddings=False),
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, rope_theta=5e5),
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    },
    "granite-4.0-h-350m": _granite_h(768, 2048, 32, (10, 13, 17, 27), 32),
    "granite-4.0-h-1b": _granite_h(1536, 4096, 40, (5, 15, 25, 35), 64),
}


def shape(name: str, folder: Path) -> Model:
    """A config.json in `folder`, for engines that make weights of their own."""
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))
    return Model(f"{name}, random weights", {"own": str(folder), "hf": str(folder)}, SHAPES[name], random=True)


def quantized_shape(name: str, folder: Path) -> Model:
    """The same as a GGUF file in `folder`, of random blocks."""
    from benchmarks import gguf_shape  # which not every peer's interpreter can import

    path = gguf_shape.write(SHAPES[name], folder / "model.gguf")
    return Model(f"{name}, random Q4_K_M", {"own": str(path), "gguf": str(path)}, SHAPES[name], random=False)


def find(name: str, dtype: str, folder: Path, *, export: bool, random: bool) -> Model:
    """A directory, a file or what nanovllm knows by a name.

    export: a GGUF file also becomes a Hugging Face directory in `folder`, for engines that do not read it.
    random: only the config.json is read.
    """
    from nanovllm.weights.checkpoint import open_checkpoint
    from nanovllm.weights.hub import resolve_model

    path = resolve_model(name)
    checkpoint = open_checkpoint(path, "dummy" if random else "auto")
    paths = {"own": str(path)}
    if path.is_dir():
        paths["hf"] = str(path)
    else:
        paths["gguf"] = str(path)
        if export:
            export_to_hf(checkpoint, dtype, folder)
            paths["hf"] = str(folder)
    return Model(name, paths, checkpoint.config, random)


def export_to_hf(checkpoint: Any, dtype: str, folder: Path) -> None:
    """checkpoint: of a GGUF file."""
    import torch
    from safetensors.torch import save_file

    kind = getattr(torch, dtype)
    tensors = {t.name: t.load().to(kind).contiguous() for t in checkpoint.tensors()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = checkpoint.config | {"dtype": dtype, "hidden_act": "silu"}
    config["eos_token_id"] = (config["eos_token_id"] or [None])[0]
    (folder / "config.json").write_text(json.dumps(config))
