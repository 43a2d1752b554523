"""Fixtures that several folders share: small random models, and the real SmolLM2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

ALIAS = "smollm2-135m"

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
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2, "head_dim": 24},
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


def make_tiny_model(family: str, path: Path, **overrides: Any) -> Path:
    """Save a small random model of the family with transformers, in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {**_SIZES, **TINY[family], **overrides}
    model_type = options["architectures"][0].removesuffix("ForCausalLM").lower()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options), dtype=torch.float32)
    for parameter in model.parameters():  # biases and norms too: zeros and ones would hide mistakes
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory):
    """tiny_model("llama") -> the directory of a saved random model."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny_model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real model's GGUF file, fetched on first use."""
    from nanovllm.weights.hub import resolve_model

    return resolve_model(ALIAS)
