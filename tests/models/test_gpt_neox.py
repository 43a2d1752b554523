"""GPT-NeoX and Pythia: their configs, of both generations, and their older files."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from checks import other_defaults
from safetensors.torch import load_file, save_file
from test_parity import all_logits
from transformers import GPTNeoXConfig as TheirConfig

from nanovllm import LLM
from nanovllm.models.gpt_neox import GPTNeoXConfig, GPTNeoXForCausalLM


def test_defaults_are_those_of_transformers():
    theirs = TheirConfig()
    assert other_defaults(GPTNeoXForCausalLM, theirs) == {"rope"}
    rope = GPTNeoXConfig.from_hf({}).rope
    assert rope.theta == theirs.rope_parameters["rope_theta"]
    assert rope.partial_rotary_factor == theirs.rope_parameters["partial_rotary_factor"] == 0.25


def test_both_generations_of_config_say_the_same():
    old = {"rotary_pct": 0.5, "rotary_emb_base": 5000, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = TheirConfig(**old).to_dict()
    assert "rotary_pct" not in new and "rope_scaling" not in new
    assert GPTNeoXConfig.from_hf(new) == GPTNeoXConfig.from_hf(old) != GPTNeoXConfig.from_hf({})


def test_rope_scaling_needs_no_max_position_embeddings_in_the_file():
    dynamic = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert GPTNeoXConfig.from_hf(dynamic) == GPTNeoXConfig.from_hf({**dynamic, "max_position_embeddings": 2048})


@pytest.mark.parametrize("family", ["gpt-neox", "gpt-neox-sequential"])
@pytest.mark.parametrize("head", ["embed_out", "lm_head"])
def test_older_files(tiny_model, tmp_path, family, head):
    """The causal mask and the frequencies saved as buffers; the head under either name, tied or not."""
    path = tiny_model(family)
    tensors = load_file(path / "model.safetensors")
    untied = tensors.pop("embed_out.weight", None)
    assert (untied is None) == (family == "gpt-neox-sequential")
    tensors[f"{head}.weight"] = tensors["gpt_neox.embed_in.weight"].clone() if untied is None else untied
    for i in range(3):
        tensors[f"gpt_neox.layers.{i}.attention.bias"] = torch.ones(1, 1, 8, 8).tril().bool()
        tensors[f"gpt_neox.layers.{i}.attention.masked_bias"] = torch.tensor(-1e9)
        tensors[f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(path / "config.json", tmp_path)
    prompt = list(range(2, 40))
    with LLM(str(path), skip_tokenizer_init=True) as new, LLM(str(tmp_path), skip_tokenizer_init=True) as old:
        np.testing.assert_array_equal(all_logits(old, prompt), all_logits(new, prompt))
