"""Scaled RoPE through the whole engine against transformers: every scaling, and 33,000 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_parity import TINY_TOLERANCE, Reference, all_logits
from tiny_models import make_tiny_model

from nanovllm import LLM, SamplingParams

TRAINED, STRETCHED = 64, 160
FACTORS = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [1.0 + i for i in range(8)]}
# name, from its rope_type: the scaling's keys, and max_position_embeddings of config.json
SCALINGS = {
    "default": ({}, STRETCHED),
    "linear": ({"factor": 2.5}, TRAINED),
    "dynamic": ({"factor": 2.5}, TRAINED),
    "yarn": ({"factor": 2.5}, TRAINED),
    "yarn-deepseek": (
        {
            "factor": 40.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
            "beta_fast": 3,
            "truncate": False,
            "original_max_position_embeddings": TRAINED,
        },
        STRETCHED,
    ),
    "llama3": (
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": TRAINED,
        },
        STRETCHED,
    ),
    "longrope": ({**FACTORS, "original_max_position_embeddings": TRAINED}, STRETCHED),
    "proportional": ({"factor": 2.5, "partial_rotary_factor": 0.5}, STRETCHED),
}


def rope_of(name: str) -> dict[str, Any]:
    scaling, limit = SCALINGS[name]
    return {
        "rope_parameters": {"rope_type": name.partition("-")[0], "rope_theta": 10000.0, **scaling},
        "max_position_embeddings": limit,
    }


def random_ids(count: int) -> list[int]:
    return np.random.default_rng(3).integers(2, 128, count).tolist()


@pytest.fixture(scope="module")
def unscaled(tmp_path_factory) -> np.ndarray:
    path = make_tiny_model("llama", tmp_path_factory.mktemp("plain"), **rope_of("default"))
    return Reference(path).logits(random_ids(STRETCHED))


@pytest.mark.parametrize("length", [TRAINED, STRETCHED])
@pytest.mark.parametrize("name", SCALINGS)
def test_all_logits_with_each_scaling(name, length, tmp_path, unscaled):
    """The prompt is as long as max_model_len: there dynamic and longrope are those of transformers."""
    path = make_tiny_model("llama", tmp_path, **rope_of(name))
    prompt = random_ids(length)
    wanted = Reference(path).logits(prompt)
    with LLM(str(path), skip_tokenizer_init=True, max_model_len=length) as llm:
        assert np.abs(all_logits(llm, prompt) - wanted).max() < TINY_TOLERANCE
    unchanged = name == "default" or (name == "dynamic" and length == TRAINED)
    assert np.allclose(wanted, unscaled[:length], atol=0.05) == unchanged  # or this test could not fail


def greedy_logits(path: Path, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """transformers' tokens, and their logits [count, V]."""
    model, ids = Reference(path, attn_implementation="sdpa").model, torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


def test_33000_tokens_in_chunks(tmp_path):
    prompt, count, found = random_ids(33_000), 6, {}
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=-1)
    for kind, keys in {"yarn": {"original_max_position_embeddings": 10_000}, "linear": {}}.items():
        path = make_tiny_model(
            "llama",
            tmp_path / kind,
            num_hidden_layers=1,
            hidden_size=32,
            num_attention_heads=2,
            initializer_range=0.3,  # sharp attention: else 33,000 values average to nothing
            max_position_embeddings=40_000,
            rope_parameters={"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **keys},
        )
        tokens, logits = greedy_logits(path, prompt, count)
        found[kind] = logits.log_softmax(-1)
        options = {"max_model_len": 40_000, "max_num_batched_tokens": 1024, "max_num_seqs": 8}
        with LLM(str(path), skip_tokenizer_init=True, **options) as llm:
            output = llm.generate(prompt, params, use_tqdm=False)[0]
        assert output["token_ids"] == tokens
        ours = torch.tensor([[row[i].logprob for i in range(128)] for row in output.outputs[0].logprobs])
        torch.testing.assert_close(ours, found[kind], rtol=0, atol=1e-4)
    assert (found["yarn"] - found["linear"]).abs().max() > 1  # the weights are the same
