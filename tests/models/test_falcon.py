"""Falcon: the configs of its forms and generations, and ALiBi in bfloat16 at far positions."""

from __future__ import annotations

import numpy as np
import pytest
from checks import other_defaults
from test_parity import GREEDY, TINY_TOLERANCE, Reference, all_logits
from tiny_models import make_tiny_model
from transformers import FalconConfig as TheirConfig

from nanovllm import LLM
from nanovllm.errors import ModelNotSupported
from nanovllm.models.falcon import (
    FalconConfig,
    FalconForCausalLM,
    OneNormLayer,
    SequentialLayer,
    TwoNormLayer,
    layer_class,
)
from nanovllm.models.registry import model_class

NEW_DECODER = {"new_decoder_architecture": True, "num_kv_heads": 8}
SIZES = {
    "7b": {},
    "40b": {**NEW_DECODER, "hidden_size": 8192, "num_attention_heads": 128, "num_hidden_layers": 60},
    "180b": {**NEW_DECODER, "hidden_size": 14848, "num_attention_heads": 232, "num_hidden_layers": 80},
    "11b": {
        **NEW_DECODER,
        "num_ln_in_parallel_attn": 1,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 60,
        "ffn_hidden_size": 16384,
        "max_position_embeddings": 8192,
        "rope_theta": 500042.0,
    },
    "rw-1b": {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 24,
        "multi_query": False,
        "parallel_attn": False,
        "alibi": True,
        "bias": True,
    },
}
FORMS = {  # key/value heads, layer
    "7b": (1, OneNormLayer),
    "40b": (8, TwoNormLayer),
    "180b": (8, TwoNormLayer),
    "11b": (8, OneNormLayer),
    "rw-1b": (32, SequentialLayer),
}


def test_defaults_are_those_of_transformers():
    theirs = TheirConfig()
    derived = {"num_kv_heads", "num_ln_in_parallel_attn", "rope"}  # 71, null and a dict there
    assert other_defaults(FalconForCausalLM, theirs) == derived
    ours = FalconConfig.from_hf({})
    assert (ours.num_kv_heads, ours.num_ln_in_parallel_attn, ours.head_dim) == (1, 1, theirs.head_dim)
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_and_their_forms(size):
    theirs = TheirConfig(**SIZES[size])
    config = FalconConfig.from_hf(SIZES[size])
    assert (config.num_kv_heads, layer_class(config)) == FORMS[size]
    assert (config.rope is None) == (not theirs.rotary)
    assert FalconConfig.from_hf(theirs.to_dict()) == config  # the generation that transformers writes now


@pytest.mark.parametrize(
    ("size", "old"),
    [
        (
            "7b",
            {"model_type": "RefinedWebModel", "multi_query": True, "parallel_attn": True, "n_head": 71, "n_layer": 32},
        ),
        ("40b", {"model_type": "RefinedWeb", "n_embed": 8192, "n_head": 128, "n_head_kv": 8, "n_layer": 60}),
        (
            "rw-1b",
            {
                "model_type": "RefinedWebModel",
                "alibi": True,
                "bias": True,
                "hidden_size": 2048,
                "multi_query": False,
                "parallel_attn": False,
                "n_head": 32,
                "n_head_kv": None,
                "n_layer": 24,
                "vocab_size": 50304,
            },
        ),
    ],
)
def test_configs_from_before_transformers_had_falcon(size, old):
    old["apply_residual_connection_post_layernorm"] = False
    assert FalconConfig.from_hf(old) == FalconConfig.from_hf(SIZES[size])
    assert model_class(["RWForCausalLM"]) is FalconForCausalLM


@pytest.mark.parametrize(
    ("variant", "told"),
    [
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2"),
        ({"num_ln_in_parallel_attn": 3, **NEW_DECODER}, "num_ln_in_parallel_attn=3"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=True"),
    ],
)
def test_refused_variants(variant, told):
    with pytest.raises(ModelNotSupported, match=told):
        FalconConfig.from_hf(variant)


def test_the_new_decoder_is_always_parallel_and_grouped():
    ignored = {"parallel_attn": False, "multi_query": False}
    assert FalconConfig.from_hf({**SIZES["40b"], **ignored}) == FalconConfig.from_hf(SIZES["40b"])


def test_rope_scaling_needs_no_max_position_embeddings_in_the_file():
    dynamic = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert FalconConfig.from_hf(dynamic) == FalconConfig.from_hf({**dynamic, "max_position_embeddings": 2048})


@pytest.mark.parametrize(("backend", "heads"), [("cpu", 4), ("cpu", 6), ("reference", 3)])
def test_alibi_is_rounded_to_bfloat16_as_in_transformers(tmp_path, backend, heads):
    """Beyond 256 a bfloat16 holds no longer every position."""
    path = make_tiny_model("falcon-rw-1b", tmp_path, num_attention_heads=heads)
    reference = Reference(path)
    prompt = np.random.default_rng(1).integers(2, 128, 420).tolist()
    options = {"skip_tokenizer_init": True, "attention_backend": backend, "max_num_batched_tokens": 300}
    with LLM(str(path), max_num_seqs=2, **options) as llm:
        assert np.abs(all_logits(llm, prompt) - reference.logits(prompt)).max() < TINY_TOLERANCE
        llm.reset_prefix_cache()
        output = llm.generate(prompt, GREEDY, use_tqdm=False)[0]  # in two chunks
        assert output["token_ids"] == reference.greedy(prompt)
