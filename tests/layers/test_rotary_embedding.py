"""Rotary embedding and each of its scalings against transformers and plain formulas."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import normal
from transformers import Gemma3TextConfig, GPTNeoXConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from nanovllm.build_context import BuildContext
from nanovllm.errors import ModelNotSupported
from nanovllm.layers.rotary_embedding import (
    RopeConfig,
    RotaryEmbedding,
    apply_rotary,
    attention_factor,
    inverse_frequencies,
)

PLAIN = RopeConfig(10000.0, {"rope_type": "default"})
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def context(max_model_len: int = 128) -> BuildContext:
    return BuildContext(torch.device("cpu"), torch.float32, max_model_len)


def hf_llama(config: dict, head_dim: int) -> LlamaConfig:
    return LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, **copy.deepcopy(config))


def hf_frequencies(config: dict, head_dim: int, length: int | None) -> tuple[torch.Tensor, float]:
    hf = hf_llama(config, head_dim)
    kind = hf.rope_parameters["rope_type"]
    if kind == "default":
        return modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters(hf)
    return ROPE_INIT_FUNCTIONS[kind](hf, None, seq_len=length)


# --- scalings ------------------------------------------------------------------------------

HEAD_DIMS = st.sampled_from([8, 16, 24, 64, 96, 128])
FACTORS = st.floats(1, 64)
LENGTHS = st.integers(64, 131072)


def maybe(**keys: st.SearchStrategy) -> dict[str, st.SearchStrategy]:
    """Keys that may also be null."""
    return {key: st.none() | values for key, values in keys.items()}


SCALINGS = {
    "default": ({}, {}),
    "linear": ({"factor": FACTORS}, {}),
    "dynamic": ({"factor": FACTORS}, {}),
    "proportional": ({}, {"factor": FACTORS}),
    "llama3": (
        {"factor": FACTORS, "low_freq_factor": st.floats(0.5, 4), "high_freq_factor": st.floats(4.1, 32)},
        {"original_max_position_embeddings": LENGTHS},
    ),
    "yarn": (
        {"factor": FACTORS},
        {
            "original_max_position_embeddings": LENGTHS,
            "truncate": st.booleans(),
            **maybe(
                attention_factor=st.floats(0.1, 2),
                beta_fast=st.integers(8, 64),
                beta_slow=st.floats(0.5, 8),
                mscale=st.floats(0.5, 2),
                mscale_all_dim=st.floats(0.5, 2),
            ),
        },
    ),
    "longrope": (
        {"original_max_position_embeddings": LENGTHS},
        maybe(attention_factor=st.floats(0.5, 2), factor=FACTORS),
    ),
}


@st.composite
def cases(draw, kind: str):
    """A config.json of either generation, a head size, and a max_model_len."""
    head_dim, (required, optional) = draw(HEAD_DIMS), SCALINGS[kind]
    scaling = draw(st.fixed_dictionaries(required, optional=optional))
    if kind == "longrope":
        factors = st.lists(st.floats(1, 64), min_size=head_dim // 2, max_size=head_dim // 2)
        scaling |= {"short_factor": draw(factors), "long_factor": draw(factors)}
    theta = draw(st.sampled_from([10000.0, 500000, 1e6]) | st.floats(100, 1e7))
    if kind != "default" and draw(st.booleans()):
        config = {"rope_theta": theta, "rope_scaling": scaling | {draw(st.sampled_from(["type", "rope_type"])): kind}}
    else:
        config = {"rope_parameters": scaling | {"rope_theta": theta, "rope_type": kind}}
    if kind == "proportional":
        config["partial_rotary_factor"] = draw(st.floats(0.1, 1))
    return config | {"max_position_embeddings": draw(LENGTHS)}, head_dim, draw(LENGTHS)


@pytest.mark.parametrize("kind", SCALINGS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_scaled_frequencies_are_those_of_transformers(kind, data):
    config, head_dim, length = data.draw(cases(kind))
    wanted, wanted_factor = hf_frequencies(config, head_dim, length)
    rope = RopeConfig.from_hf(config)
    assert rope.rotary_dim(head_dim) == head_dim
    # to the bit: at position 131071 an ulp of the highest frequency is 1/128 radian
    rtol = 2e-7 if kind == "proportional" else 0  # there it raises a shorter vector to powers
    torch.testing.assert_close(inverse_frequencies(head_dim, rope, length), wanted, rtol=rtol, atol=0)
    assert attention_factor(rope) == pytest.approx(wanted_factor, rel=1e-12)


def test_every_scaling_of_transformers_is_tested():
    assert {*SCALINGS} == {*ROPE_INIT_FUNCTIONS, "default"}


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        LLAMA3 | {"original_max_position_embeddings": 8192},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {
            "rope_type": "longrope",
            "short_factor": [1.0 + i / 9 for i in range(32)],
            "long_factor": [1.0 + i for i in range(32)],
            "original_max_position_embeddings": 4096,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_rotation_is_that_of_transformers_up_to_position_131071(scaling):
    """fp32 angles of that size are multiples of 1/128 radian; parity needs the same ones."""
    config = {"max_position_embeddings": 32768, "rope_parameters": {"rope_theta": 500000.0, **scaling}}
    positions = torch.cat([torch.arange(70), torch.arange(65530, 65540), torch.arange(131060, 131072)])
    q, k = normal(1, 4, len(positions), 64), normal(1, 2, len(positions), 64, seed=1)
    hf_cos, hf_sin = modeling_llama.LlamaRotaryEmbedding(hf_llama(config, 64))(q, positions[None])
    hf_q, hf_k = modeling_llama.apply_rotary_pos_emb(q, k, hf_cos, hf_sin)

    layer = RotaryEmbedding(64, RopeConfig.from_hf(config), context(max_model_len=131072))
    cos, sin, ops = layer(positions)
    assert cos.shape == (len(positions), 1, 32)
    # dynamic: transformers raises the base in fp32 there, in the middle of a forward pass
    tolerance = 2e-2 if scaling["rope_type"] == "dynamic" else 2e-6
    for x, wanted in ((q, hf_q), (k, hf_k)):
        out = apply_rotary(x[0].transpose(0, 1), cos, sin, ops)
        torch.testing.assert_close(out, wanted[0].transpose(0, 1), rtol=0, atol=tolerance)


@pytest.mark.parametrize("length", [200, 256, 257, 1000])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_scalings_by_length_are_those_of_a_sequence_of_max_model_len(kind, length):
    """A key must not change while its sequence grows, so the tables are fixed when they are made."""
    scaling = {"rope_type": kind, "factor": 4.0}
    if kind == "longrope":
        scaling |= {"short_factor": [1.5] * 8, "long_factor": [6.0] * 8, "original_max_position_embeddings": 256}
    config = {"max_position_embeddings": 256, "rope_parameters": {"rope_theta": 10000.0, **scaling}}
    rotary = modeling_llama.LlamaRotaryEmbedding(hf_llama(config, 16))
    wanted_cos, wanted_sin = rotary(torch.empty(0), torch.arange(length)[None])
    cos, sin, _ = RotaryEmbedding(16, RopeConfig.from_hf(config), context(length))(torch.arange(length))
    torch.testing.assert_close(cos[:, 0], wanted_cos[0, :, :8], rtol=0, atol=1e-4)
    torch.testing.assert_close(sin[:, 0], wanted_sin[0, :, :8], rtol=0, atol=1e-4)
    short = inverse_frequencies(16, RopeConfig.from_hf(config))
    assert torch.equal(inverse_frequencies(16, RopeConfig.from_hf(config), length), short) == (length <= 256)


def test_factors_divide_the_frequencies():
    """GGUF files carry llama3's scaling so."""
    plain = inverse_frequencies(16, PLAIN)
    scaled = inverse_frequencies(16, RopeConfig(10000.0, LLAMA3))
    assert not torch.equal(plain, scaled)
    factors = RopeConfig(10000.0, {"rope_type": "factors", "factors": (plain / scaled).tolist()})
    torch.testing.assert_close(inverse_frequencies(16, factors), scaled)
    assert attention_factor(factors) == 1.0


# --- config.json ---------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 4.0}, LLAMA3], ids=lambda s: s["rope_type"])
def test_both_generations_of_config_read_alike(scaling):
    oldest = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    for config in (
        {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5, **scaling}},
        {"rope_parameters": {**scaling}, "rope_theta": 5e5, "partial_rotary_factor": 0.5},
        {"rope_theta": 5e5, "rope_scaling": scaling, "partial_rotary_factor": 0.5},
        {"rope_theta": 5e5, "rope_scaling": oldest, "rotary_pct": 0.5},
        {"rotary_emb_base": 5e5, "rope_scaling": {**oldest, **scaling}, "rotary_pct": 0.5},
    ):
        assert RopeConfig.from_hf(config) == RopeConfig(5e5, scaling, 0.5)


def test_absent_and_null_rope_keys_mean_plain_rope():
    for config in ({}, {"rope_scaling": None}, {"rope_parameters": None, "rope_theta": None}, {"rotary_pct": None}):
        assert RopeConfig.from_hf(config) == PLAIN
    assert RopeConfig.from_hf({}, default_theta=1e6).theta == 1e6


def test_reading_a_config_leaves_it_as_it_was():
    config = {
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_theta": 5.0, "type": "yarn", "factor": None, "partial_rotary_factor": 0.5},
    }
    before = copy.deepcopy(config)
    RopeConfig.from_hf(config)
    assert config == before


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope_theta": 2e6, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_theta": 3e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 3e4, "rope_type": "default"},
            }
        },
        {"rope_parameters": {"full_attention": {"rope_theta": 3e6, "rope_type": "default"}}},
        {
            "rope_theta": 4e6,
            "rope_local_base_freq": 4e4,
            "rope_parameters": {
                "sliding_attention": None,
                "full_attention": {"rope_type": "yarn", "factor": 2.0},
            },
            "max_position_embeddings": 4096,
        },
    ],
    ids=["defaults", "legacy", "by-type", "one-type", "top-level-theta"],
)
@pytest.mark.parametrize("layer_type", ["full_attention", "sliding_attention"])
def test_a_rope_for_each_layer_type_is_read_as_by_transformers(config, layer_type):
    defaults = {"full_attention": 1e6, "sliding_attention": 1e4}
    rope = RopeConfig.from_hf(config, defaults[layer_type], layer_type=layer_type)
    wanted = Gemma3TextConfig(**copy.deepcopy(config)).rope_parameters[layer_type]
    assert {"rope_theta": rope.theta, **rope.scaling} == wanted


def test_a_model_with_one_rope_refuses_a_config_with_several():
    config = {"rope_parameters": {"full_attention": {"rope_type": "default"}}}
    with pytest.raises(ModelNotSupported, match="RoPE for each of full_attention"):
        RopeConfig.from_hf(config)


@pytest.mark.parametrize(
    ("config", "original", "factor"),
    [
        pytest.param({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 32768, 4.0, id="qwen"),
        pytest.param(
            {"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 4096}},
            4096,
            8.0,
            id="deepseek",
        ),
        pytest.param({"original_max_position_embeddings": 4096, "rope_scaling": {"type": "su"}}, 4096, 8.0, id="phi3"),
        pytest.param({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 32768, 2.0, id="dynamic"),
    ],
)
def test_what_a_scaling_leaves_out_follows_from_the_positions(config, original, factor):
    rope = RopeConfig.from_hf({"max_position_embeddings": 32768, **config})
    assert (rope.scaling["original_max_position_embeddings"], rope.scaling["factor"]) == (original, factor)
    assert rope.scaling["rope_type"] in ("yarn", "longrope", "dynamic")


@pytest.mark.parametrize(
    ("scaling", "wanted"),
    [
        ({"rope_type": "default"}, 32768),
        (LLAMA3, 32768),
        ({"rope_type": "linear", "factor": 2.5}, 81920),
        ({"rope_type": "dynamic", "factor": 2.0}, 65536),
        ({"rope_type": "yarn", "factor": 4.0}, 131072),
        ({"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}, 163840),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 4096}, 32768),
        ({"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 4096}, 32768),
    ],
    ids=str,
)
def test_max_positions(scaling, wanted):
    rope = RopeConfig.from_hf({"max_position_embeddings": 32768, "rope_scaling": scaling})
    assert rope.max_positions(32768) == wanted


LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 2.0}


@pytest.mark.parametrize(
    ("scaling", "key"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": None}, "factor"),
        ({"rope_type": "linear", "factor": "x"}, "factor"),
        ({"rope_type": "linear", "factor": -1.0}, "factor"),
        ({"rope_type": "dynamic", "factor": True}, "factor"),
        ({"rope_type": "dynamic", "factor": 2.0}, "original_max_position_embeddings"),
        ({"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings"),
        ({"rope_type": "yarn", "original_max_position_embeddings": 64}, "factor"),
        *((({k: v for k, v in LLAMA3.items() if k != key}), key) for key in LLAMA3 if key != "rope_type"),
        (LONGROPE | {"short_factor": [1.0] * 8}, "long_factor"),
        (LONGROPE | {"long_factor": [1.0] * 7}, "long_factor"),
        (LONGROPE | {"long_factor": [1.0] * 7 + ["x"]}, "long_factor"),
        ({"rope_type": "longrope", "long_factor": [1.0] * 8, "original_max_position_embeddings": 64}, "factor"),
        ({"rope_type": "factors", "factors": 3}, "factors"),
    ],
    ids=str,
)
def test_an_incomplete_scaling_is_refused_by_its_key(scaling, key):
    """A KeyError or TypeError from within the formulas named no file."""
    with pytest.raises(ModelNotSupported, match=rf"config.json: .*{scaling['rope_type']}' is incomplete: '{key}'"):
        RotaryEmbedding(16, RopeConfig.from_hf({"rope_scaling": scaling}), context())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_theta": "x"}, "'rope_theta' is 'x'"),
        ({"rope_parameters": {"rope_theta": 0}}, "'rope_theta' is 0"),
        ({"rotary_pct": -1}, "'partial_rotary_factor' is -1"),
        ({"rope_scaling": [1]}, "must be a dict"),
    ],
)
def test_wrong_numbers_are_refused(config, message):
    with pytest.raises(ModelNotSupported, match=message):
        RopeConfig.from_hf(config)


def test_other_scalings_are_refused_by_name():
    with pytest.raises(ModelNotSupported, match="'mrope' is not supported; supported: default, linear, dynamic"):
        RotaryEmbedding(16, RopeConfig.from_hf({"rope_scaling": {"type": "mrope"}}), context())


# --- the rotation --------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.25, 0.5, 0.3, 1.0])
@pytest.mark.parametrize("scaling", [{}, {"rope_type": "linear", "factor": 2.0}], ids=["default", "linear"])
def test_partial_rotation_is_that_of_gpt_neox(share, scaling):
    """0.3 of 80 dimensions is 24; the others pass through."""
    config = {"rope_parameters": {"partial_rotary_factor": share, "rope_theta": 5000.0, **scaling}}
    hf_config = GPTNeoXConfig(hidden_size=160, num_attention_heads=2, **copy.deepcopy(config))
    positions = torch.tensor([0, 1, 77, 500])
    q, k = normal(1, 2, 4, 80), normal(1, 2, 4, 80, seed=1)
    cos_sin = modeling_gpt_neox.GPTNeoXRotaryEmbedding(hf_config)(q, positions[None])
    wanted = modeling_gpt_neox.apply_rotary_pos_emb(q, k, *cos_sin)

    rope = RopeConfig.from_hf(config)
    cos, sin, ops = RotaryEmbedding(rope.rotary_dim(80), rope, context(512))(positions)
    assert cos.shape == (4, 1, int(80 * share) // 2)
    for x, rotated in zip((q, k), wanted, strict=True):
        out = apply_rotary(x[0].transpose(0, 1), cos, sin, ops)
        torch.testing.assert_close(out, rotated[0].transpose(0, 1), rtol=0, atol=1e-6)
        passed = slice(int(80 * share), None)
        assert torch.equal(out[..., passed], x[0].transpose(0, 1)[..., passed])


def test_rotation_keeps_positions_relative_and_lengths():
    layer = RotaryEmbedding(64, PLAIN, context())
    q, k = normal(1, 1, 64), normal(1, 1, 64, seed=1)

    def product(i: int, j: int) -> float:
        rotated = [apply_rotary(x, *layer(torch.tensor([at]))) for x, at in ((q, i), (k, j))]
        return float((rotated[0] * rotated[1]).sum())

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-3)
    assert product(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-5)
    assert abs(product(7, 3) - product(7, 6)) > 1e-2


@pytest.mark.parametrize("head_dim", [16, 24])
def test_rotation_is_computed_in_fp32(head_dim):
    layer = RotaryEmbedding(16, PLAIN, context())
    rope = layer(torch.tensor([97]))
    assert rope.cos.dtype == rope.sin.dtype == torch.float32
    x = normal(1, 2, head_dim).bfloat16()
    out = apply_rotary(x, *rope)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, apply_rotary(x.float(), *rope).bfloat16())


def test_tables_cover_every_position():
    layer = RotaryEmbedding(16, PLAIN, context(max_model_len=37))
    cos, _, _ = layer(torch.tensor([36]))
    wanted = np.cos(36 * 10000.0 ** -(np.arange(0, 16, 2) / 16))
    np.testing.assert_allclose(cos[0, 0], wanted, atol=1e-5)
