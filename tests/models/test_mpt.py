"""MPT: its configs, what it refuses, and the two keys that transformers does not follow."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checks import other_defaults
from test_parity import TINY_TOLERANCE, Reference, all_logits
from tiny_models import make_tiny_model
from transformers import MptConfig as TheirConfig
from transformers.models.mpt import modeling_mpt

from nanovllm import LLM
from nanovllm.errors import ConfigError, ModelNotSupported
from nanovllm.models.mpt import MptAttentionConfig, MptConfig, MptForCausalLM

PROMPT = np.random.default_rng(1).integers(2, 131, 256).tolist()


def test_defaults_are_those_of_transformers():
    theirs = TheirConfig()
    assert other_defaults(MptForCausalLM, theirs) == {"attn_config"}
    ours = MptConfig.from_hf({}).attn_config
    assert vars(ours) == {name: getattr(theirs.attn_config, name) for name in vars(ours)}
    assert MptConfig.from_hf(theirs.to_dict()) == MptConfig.from_hf({})


def test_the_first_config_files(tiny_model, tmp_path):
    """Another spelling of the architecture, and keys of MosaicML's own."""
    path = tiny_model("mpt-clipped")
    config = json.loads((path / "config.json").read_text())
    config["attn_config"] |= {"attn_impl": "triton", "attn_pdrop": 0, "attn_uses_sequence_id": True}
    config |= {"architectures": ["MPTForCausalLM"], "learned_pos_emb": True, "verbose": 0, "init_device": "meta"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    with LLM(str(path), skip_tokenizer_init=True) as new, LLM(str(tmp_path), skip_tokenizer_init=True) as old:
        np.testing.assert_array_equal(all_logits(old, PROMPT), all_logits(new, PROMPT))


@pytest.mark.parametrize(
    "variant",
    [
        {"no_bias": False},
        {"logit_scale": "inv_sqrt_d_model"},
        {"norm_type": "rmsnorm"},
        {"attn_config": {"attn_type": "multiquery_attention"}},
        {"attn_config": {"qk_ln": True}},
        {"attn_config": {"prefix_lm": True}},
        {"attn_config": {"alibi": False}},
    ],
    ids=str,
)
def test_variants_that_transformers_takes_for_others_are_refused(variant):
    key, value = next(iter((variant.get("attn_config") or variant).items()))
    with pytest.raises(ModelNotSupported, match=f"{key}={value!r}"):
        MptConfig.from_hf(variant)


@pytest.mark.parametrize("heads", [3, 4])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_alibi_bias_max(tmp_path, monkeypatch, heads, clip):
    """StoryWriter has 16, and transformers computes its slopes with 8 whatever the file says."""

    def with_16(self, num_heads, length, device):
        return modeling_mpt.build_mpt_alibi_tensor(num_heads, length, 16, device)

    attention = {"alibi_bias_max": 16, "clip_qkv": clip}
    path = make_tiny_model("mpt", tmp_path, attn_config=attention, n_heads=heads)
    reference = Reference(path)
    with LLM(str(path), skip_tokenizer_init=True) as llm:
        found = all_logits(llm, PROMPT)
    assert np.abs(found - reference.logits(PROMPT)).max() > 100 * TINY_TOLERANCE
    monkeypatch.setattr(modeling_mpt.MptModel, "build_mpt_alibi_tensor", with_16)
    assert np.abs(found - reference.logits(PROMPT)).max() < TINY_TOLERANCE


def test_expansion_ratio(tiny_model, tmp_path):
    """transformers always expands by 4, so the reference gets its layers by hand."""
    reference = Reference(tiny_model("mpt"))
    for block in reference.model.transformer.blocks:
        block.ffn.up_proj = torch.nn.Linear(48, 144, bias=False)
        block.ffn.down_proj = torch.nn.Linear(144, 48, bias=False)
    reference.model.config.expansion_ratio = 3
    reference.model.save_pretrained(tmp_path)
    with LLM(str(tmp_path), skip_tokenizer_init=True) as llm:
        assert np.abs(all_logits(llm, PROMPT) - reference.logits(PROMPT)).max() < TINY_TOLERANCE


def test_max_seq_len_bounds_max_model_len(tiny_model):
    with pytest.raises(ConfigError, match="256 positions"):
        LLM(str(tiny_model("mpt")), skip_tokenizer_init=True, max_model_len=257)


def test_attention_config_may_be_null():
    assert MptConfig.from_hf({"attn_config": None}).attn_config == MptAttentionConfig()
