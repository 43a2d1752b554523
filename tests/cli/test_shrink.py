"""Tiny configs that keep what makes a family's variant."""

from __future__ import annotations

import pytest

from nanovllm.cli.shrink import shrink_config

LLAMA31 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008],
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


def test_sizes_shrink_and_choices_stay():
    small = shrink_config(LLAMA31)
    assert small["hidden_size"] == 64
    assert (small["num_attention_heads"], small["num_key_value_heads"], small["num_hidden_layers"]) == (4, 2, 3)
    assert small["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256}
    assert (small["bos_token_id"], small["eos_token_id"]) == (0, 1)
    assert (small["tie_word_embeddings"], small["dtype"]) == (False, "float32")
    assert "torch_dtype" not in small
    assert LLAMA31["hidden_size"] == 4096


@pytest.mark.parametrize(("heads", "kv_heads", "expected"), [(71, 71, 4), (32, 1, 1), (32, 8, 2), (16, None, None)])
def test_key_value_heads_stay_shared_as_they_were(heads, kv_heads, expected):
    small = shrink_config({"hidden_size": 512, "num_attention_heads": heads, "num_key_value_heads": kv_heads})
    assert small["num_key_value_heads"] == expected


@pytest.mark.parametrize(("head_dim", "expected"), [(32, 16), (64, 24), (None, 16)])
def test_a_head_dim_of_its_own_stays_its_own(head_dim, expected):
    config = {"hidden_size": 512, "num_attention_heads": 16, "head_dim": head_dim}
    assert shrink_config(config)["head_dim"] == expected


def test_every_kind_of_layer_stays():
    kinds = ["mamba"] * 10 + ["attention"] + ["mamba"] * 5
    small = shrink_config({"num_hidden_layers": 16, "layer_types": kinds})
    assert small == {"num_hidden_layers": 3, "layer_types": ["mamba", "mamba", "attention"], "dtype": "float32"}
    many = [f"kind {i % 5}" for i in range(16)]
    assert shrink_config({"n_layer": 16, "layer_types": many})["layer_types"] == many[:5]


def test_a_window_becomes_shorter_than_the_prompts_and_none_stays_none():
    assert shrink_config({"sliding_window": 4096})["sliding_window"] == 20
    assert shrink_config({"sliding_window": None})["sliding_window"] is None
    assert shrink_config({"num_local_experts": 0, "n_inner": None}) == {
        "num_local_experts": 0,
        "n_inner": None,
        "dtype": "float32",
    }


def test_factors_of_frequencies_are_as_many_as_there_are():
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "factor": 32.0}
    config = {"hidden_size": 3072, "num_attention_heads": 32, "rope_parameters": {"full": scaling, "local": {}}}
    found = shrink_config(config)["rope_parameters"]
    assert found == {"full": {**scaling, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}, "local": {}}


def test_the_language_model_of_a_model_that_sees():
    small = shrink_config({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 2560}})
    assert small == {"model_type": "gemma3_text", "hidden_size": 64, "dtype": "float32"}
