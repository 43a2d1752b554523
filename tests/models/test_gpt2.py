"""GPT-2: its configs, the files of the first release, the last position."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from checks import other_defaults
from safetensors.torch import load_file, save_file
from test_parity import TINY_TOLERANCE, Reference, all_logits
from transformers import GPT2Config as TheirConfig

from nanovllm import LLM
from nanovllm.errors import ConfigError, ModelNotSupported
from nanovllm.models.gpt2 import GPT2Config, GPT2LMHeadModel


def test_defaults_are_those_of_transformers():
    assert other_defaults(GPT2LMHeadModel, TheirConfig()) == {"n_inner"}  # null there
    assert GPT2Config.from_hf({"n_embd": 60}).n_inner == 240
    assert GPT2Config.from_hf({"n_embd": 60, "n_inner": 7}).n_inner == 7


def test_cross_attention_is_refused():
    with pytest.raises(ModelNotSupported, match="add_cross_attention=True"):
        GPT2Config.from_hf({"add_cross_attention": True})


def test_all_learned_positions_and_no_more(tiny_model):
    path = tiny_model("gpt2")
    prompt = np.random.default_rng(1).integers(2, 131, 256).tolist()
    with LLM(str(path), skip_tokenizer_init=True) as llm:
        assert llm.engine.config.max_model_len == 256
        assert np.abs(all_logits(llm, prompt) - Reference(path).logits(prompt)).max() < TINY_TOLERANCE
    with pytest.raises(ConfigError, match="256 positions"):
        LLM(str(path), skip_tokenizer_init=True, max_model_len=257)


def test_files_of_the_first_release(tiny_model, tmp_path):
    """Names without `transformer.`, the causal mask saved as a buffer, the tied head saved again."""
    path = tiny_model("gpt2")
    tensors = load_file(path / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert set(old).isdisjoint(tensors)
    for i in range(3):
        old[f"h.{i}.attn.bias"] = torch.ones(1, 1, 256, 256).tril().bool()
        old[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(old | {"lm_head.weight": old["wte.weight"].clone()}, tmp_path / "model.safetensors")
    shutil.copy(path / "config.json", tmp_path)
    prompt = list(range(2, 40))
    with LLM(str(path), skip_tokenizer_init=True) as new, LLM(str(tmp_path), skip_tokenizer_init=True) as first:
        np.testing.assert_array_equal(all_logits(first, prompt), all_logits(new, prompt))
