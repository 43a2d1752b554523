"""Granite 4.0 H: its config against transformers', the published one, and the limits of the time step."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checks import other_defaults
from published_sizes import PUBLISHED
from test_parity import GREEDY, TINY_TOLERANCE, Reference, all_logits, prompts_for
from tiny_models import TINY, make_tiny_model
from transformers import GraniteMoeHybridConfig as TheirConfig

from nanovllm import LLM
from nanovllm.build_context import BuildContext
from nanovllm.cache_spec import StateSpec
from nanovllm.errors import ModelNotSupported
from nanovllm.layers.attention import CachedLayer
from nanovllm.models.granite_hybrid import GraniteHybridConfig, GraniteMoeHybridForCausalLM

HYBRIDS = [name for name, config in TINY.items() if config["architectures"] == ["GraniteMoeHybridForCausalLM"]]
KINDS = {"mamba": "linear_attention", "attention": "full_attention"}


def test_defaults_are_those_of_transformers():
    theirs, ours = TheirConfig(), GraniteHybridConfig.from_hf({})
    assert other_defaults(GraniteMoeHybridForCausalLM, theirs) == {"rope", "head_dim", "layer_types"}
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.head_dim == theirs.hidden_size // theirs.num_attention_heads
    assert [KINDS[kind] for kind in ours.layer_types] == theirs.layer_types


@pytest.mark.parametrize("key", ["layer_types", "layers_block_type"])
def test_both_generations_of_config_say_the_same(key):
    old = {
        "hidden_size": 60,
        "num_attention_heads": 6,
        "num_hidden_layers": 3,
        key: ["mamba", "attention", "mamba"],
        "mamba_n_heads": 12,
        "mamba_d_head": "auto",
        "rope_theta": 5000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "time_step_limit": [0.25, 3.0],
    }
    new = TheirConfig(**old).to_dict()
    assert new["mamba_d_head"] == 10 and new["layer_types"][1] == "full_attention"
    ours = GraniteHybridConfig.from_hf(new)
    assert ours == GraniteHybridConfig.from_hf(old)
    assert ours.layer_types == ("mamba", "attention", "mamba")
    assert ours.mamba.time_step_limit == (0.25, 3.0)


@pytest.mark.parametrize(
    "limit", [None, [0.0, float("inf")], [0.0, {"__float__": "Infinity"}], ["0.0", "Infinity"]], ids=str
)
def test_no_limit_in_every_spelling(limit):
    """json.dump writes Infinity, transformers 5 an object in its place."""
    config = json.loads(json.dumps({"time_step_limit": limit}))
    assert GraniteHybridConfig.from_hf(config).time_step_limit == (0.0, float("inf"))


def test_the_published_350m():
    """4 KiB of keys and values a token, 21 MiB of state and 0.3 of convolution a sequence."""
    published = PUBLISHED["ibm-granite/granite-4.0-h-350m"][1]
    config = GraniteHybridConfig.from_hf(
        published | {"embedding_multiplier": 12, "attention_multiplier": 0.015625, "residual_multiplier": 0.246}
    )
    assert [i for i, kind in enumerate(config.layer_types) if kind == "attention"] == [10, 13, 17, 27]
    assert (config.mamba.conv_size, config.mamba.inner_size, config.head_dim) == (1792, 1536, 64)
    assert config.attention_multiplier == 1 / 64 and config.position_embedding_type == "nope"
    ctx = BuildContext(torch.device("meta"), torch.bfloat16, 64)
    model = GraniteMoeHybridForCausalLM(config, ctx)
    assert model.model.rotary_emb is None
    specs = [layer.cache_spec for layer in model.modules() if isinstance(layer, CachedLayer)]
    states = [spec for spec in specs if isinstance(spec, StateSpec)]
    assert len(states) == 28 and {spec.grid for spec in states} == {64}
    assert sum(spec.slot_bytes for spec in states) == 21 * 2**20 + 28 * 3 * 1792 * 2
    assert sum(spec.block_bytes(1) for spec in specs if not isinstance(spec, StateSpec)) == 4 * 2**10


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"num_hidden_layers": 2, "layer_types": ["mamba", "sliding_attention"]}, "sliding_attention"),
        ({"num_hidden_layers": 3, "layer_types": ["mamba", "attention"]}, "each of the 3 layers"),
        ({"hidden_size": 64, "mamba_n_heads": 5}, "5 Mamba heads of 25 do not make up 128"),
        ({"hidden_size": 64, "mamba_n_heads": 4, "mamba_d_head": 16}, "4 Mamba heads of 16 do not make up 128"),
        ({"hidden_size": 64, "mamba_n_heads": 4, "mamba_n_groups": 3}, "3 groups do not divide 4 Mamba heads"),
    ],
)
def test_refused_variants(config, message):
    with pytest.raises(ModelNotSupported, match=message):
        GraniteHybridConfig.from_hf(config)


@pytest.mark.parametrize("family", HYBRIDS)
def test_torchs_logits_and_text_are_those_of_transformers(tiny_model, family):
    """Where there is no compiler, and on GPUs; the native ones are compared in test_parity.py."""
    path = tiny_model(family)
    reference = Reference(path)
    prompts = prompts_for(128)
    with LLM(str(path), skip_tokenizer_init=True, kernels="torch", max_num_batched_tokens=70, max_num_seqs=5) as llm:
        for prompt in prompts:
            assert np.abs(all_logits(llm, prompt) - reference.logits(prompt)).max() < TINY_TOLERANCE
        llm.reset_prefix_cache()
        found = [o["token_ids"] for o in llm.generate(prompts, GREEDY, use_tqdm=False)]
    assert found == [reference.greedy(prompt) for prompt in prompts]


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_time_step_limits_hold_in_prompts_as_in_transformers(tmp_path, kernels):
    """Not compared in decoding: there transformers forgets them, and gives other logits than for the
    same tokens in one pass."""
    path = make_tiny_model("granite-hybrid", tmp_path, time_step_limit=(0.9, 1.2))
    reference = Reference(path)
    unlimited = Reference(make_tiny_model("granite-hybrid", tmp_path / "unlimited"))
    with LLM(str(path), skip_tokenizer_init=True, kernels=kernels) as llm:
        for prompt in prompts_for(128):
            logits = all_logits(llm, prompt)
            assert np.abs(logits - reference.logits(prompt)).max() < TINY_TOLERANCE
        assert np.abs(logits - unlimited.logits(prompt)).max() > 100 * TINY_TOLERANCE
