"""Layers against plain formulas and against transformers."""

from __future__ import annotations

import pytest
import torch
from kernels import normal
from torch import nn

from nanovllm.build_context import BuildContext
from nanovllm.distributed.group import TPGroup
from nanovllm.errors import ConfigError, ModelNotSupported
from nanovllm.layers.activation import ACTIVATIONS, activation
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm
from nanovllm.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    Shard,
)
from nanovllm.layers.mlp import GatedMLP

CPU = torch.device("cpu")


def context(dtype=torch.float32, max_model_len=128, tp=None) -> BuildContext:
    return BuildContext(CPU, dtype, max_model_len, tp or TPGroup())


# --- normalisation and activation ----------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 32), (5, 3, 32), (0, 32)])
def test_rms_norm(shape):
    layer = RMSNorm(32, 1e-3, context())
    layer.load_weight("weight", normal(32, seed=1), None)
    x = normal(*shape) * 0.05  # small, so that eps counts
    mean = x.double().square().mean(-1, keepdim=True)
    torch.testing.assert_close(layer(x), (x / (mean + 1e-3).sqrt() * normal(32, seed=1)).float())


def test_rms_norm_leaves_its_input_alone():
    """nano-vllm #169, #171, #205: an fp32 input was normalised in place, and the residual with it."""
    layer = RMSNorm(32, 1e-6, context())
    layer.load_weight("weight", torch.full((32,), 2.0), None)
    x = normal(5, 32)
    before = x.clone()
    layer(x)
    assert torch.equal(x, before)


def test_row_parallel_linear_takes_a_bias():
    """nano-vllm #203: a bias crashed the row-parallel layer while loading."""
    layer = RowParallelLinear(8, 4, context(), bias=True)
    layer.load_weight("weight", normal(4, 8), None)
    layer.load_weight("bias", normal(4, seed=1), None)
    layer.finalize_weights()
    x = normal(3, 8, seed=2)
    torch.testing.assert_close(layer(x), (x @ normal(4, 8).T + normal(4, seed=1)).float())


def test_rms_norm_has_fp32_statistics_in_bfloat16():
    layer = RMSNorm(512, 1e-6, context(torch.bfloat16))
    layer.load_weight("weight", torch.ones(512), None)
    x = (normal(4, 512) * 300).bfloat16()
    wanted = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).double(), wanted, rtol=2**-8, atol=0)


def test_gemma_norm_adds_one_to_its_weight():
    layer = GemmaRMSNorm(16, 1e-6, context())
    layer.load_weight("weight", normal(16), None)
    layer.finalize_weights()
    x = normal(4, 16, seed=1)
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + normal(16))
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(bias):
    layer = LayerNorm(16, 1e-5, context(), bias=bias)
    layer.load_weight("weight", normal(16), None)
    if bias:
        layer.load_weight("bias", normal(16, seed=1), None)
    x = normal(4, 16, seed=2)
    wanted = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * normal(16)
    torch.testing.assert_close(layer(x), wanted + normal(16, seed=1) if bias else wanted)
    assert set(layer.expected_weights()) == ({"weight", "bias"} if bias else {"weight"})


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    from transformers.activations import ACT2FN

    torch.testing.assert_close(activation(name)(normal(64)), ACT2FN[name](normal(64)))


def test_an_unknown_activation_is_refused():
    with pytest.raises(ModelNotSupported, match="'quick_gelu' is not supported; supported: gelu"):
        activation("quick_gelu")


def test_gated_mlp_gates_with_the_first_shard():
    layer = GatedMLP(8, 5, context(), act="gelu")
    for name, seed in (("gate", 0), ("up", 1)):
        layer.gate_up_proj.load_weight("weight", normal(5, 8, seed=seed), name)
    layer.down_proj.load_weight("weight", normal(8, 5, seed=2), None)
    x = normal(3, 8, seed=3)
    wanted = torch.nn.functional.gelu(x @ normal(5, 8).T) * (x @ normal(5, 8, seed=1).T) @ normal(8, 5, seed=2).T
    torch.testing.assert_close(layer(x), wanted)


# --- linear --------------------------------------------------------------------------------


def load_shards(layer, shapes: dict, parameter: str, dtype=torch.float32) -> dict[str | None, torch.Tensor]:
    whole = {shard: normal(*shape, seed=i + 10).to(dtype) for i, (shard, shape) in enumerate(shapes.items())}
    for shard in reversed(whole):  # order on disk is anybody's
        layer.load_weight(parameter, whole[shard], shard)
    return whole


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_linear_is_its_shards_side_by_side(dtype, rows, bias):
    """In bfloat16 the weight may be packed for oneDNN; the result must not tell."""
    shards = {name: Shard(n, slice(0, n)) for name, n in (("a", 24), ("b", 8), ("c", 16))}
    layer = MergedColumnParallelLinear(40, shards, context(dtype), bias=bias)
    expected = layer.expected_weights()
    assert expected["weight"] == {"a": (24, 40), "b": (8, 40), "c": (16, 40)}
    weights = load_shards(layer, expected["weight"], "weight", dtype)
    biases = {name: torch.zeros(()) for name in weights}
    if bias:
        assert expected["bias"] == {"a": (24,), "b": (8,), "c": (16,)}
        biases = load_shards(layer, expected["bias"], "bias", dtype)
    else:
        assert "bias" not in expected
    layer.finalize_weights()
    x = normal(rows, 40).to(dtype)
    parts = [x.double() @ weights[name].double().T + biases[name].double() for name in weights]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    out = layer(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), torch.cat(parts, dim=1), **tolerance)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 32])
def test_packed_bfloat16_is_close_to_the_plain_product(rows, bias):
    """Both accumulate in fp32: they differ by the rounding of the result alone."""
    layer = ColumnParallelLinear(576, 192, context(torch.bfloat16), bias=bias)
    weight, offset = (normal(192, 576, seed=1) * 0.05).bfloat16(), normal(192, seed=2).bfloat16()
    layer.load_weight("weight", weight, None)
    if bias:
        layer.load_weight("bias", offset, None)
    x = normal(rows, 576).bfloat16()
    before = layer(x)
    layer.finalize_weights()
    plain = nn.functional.linear(x, weight, offset if bias else None)
    torch.testing.assert_close(before, plain)
    torch.testing.assert_close(layer(x), plain, rtol=2**-7, atol=2**-7)


def test_qkv_shards_are_sized_by_heads():
    layer = QKVParallelLinear(32, num_heads=4, num_kv_heads=2, head_dim=24, ctx=context(), bias=True)
    assert layer.expected_weights() == {
        "weight": {"q": (96, 32), "k": (48, 32), "v": (48, 32)},
        "bias": {"q": (96,), "k": (48,), "v": (48,)},
    }
    weights = load_shards(layer, layer.expected_weights()["weight"], "weight")
    biases = load_shards(layer, layer.expected_weights()["bias"], "bias")
    layer.finalize_weights()
    x = normal(3, 32)
    for name, out in zip("qkv", layer(x).split((96, 48, 48), dim=1), strict=True):
        torch.testing.assert_close(out, x @ weights[name].T + biases[name], rtol=1e-5, atol=1e-5)


def test_weights_of_another_float_type_are_converted():
    layer = RowParallelLinear(8, 4, context(), bias=False)
    weight = normal(4, 8).half()
    layer.load_weight("weight", weight, None)
    layer.finalize_weights()
    torch.testing.assert_close(layer(torch.eye(8)), weight.float().T)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_takes_its_rows_of_each_shard(rank):
    tp = TPGroup(rank, 2)
    shards = {name: Shard(n, tp.part(n, name)) for name, n in (("a", 4), ("b", 6))}
    layer = MergedColumnParallelLinear(8, shards, context(tp=tp), bias=True)
    assert layer.expected_weights()["weight"] == {"a": (4, 8), "b": (6, 8)}  # whole, as on disk
    weights = load_shards(layer, {"a": (4, 8), "b": (6, 8)}, "weight")
    biases = load_shards(layer, {"a": (4,), "b": (6,)}, "bias")
    layer.finalize_weights()
    mine = {"a": slice(2 * rank, 2 * rank + 2), "b": slice(3 * rank, 3 * rank + 3)}
    weight = torch.cat([weights[name][mine[name]] for name in mine])
    bias = torch.cat([biases[name][mine[name]] for name in mine])
    torch.testing.assert_close(layer(torch.eye(8)), weight.T + bias)


def test_heads_that_do_not_divide_over_the_ranks_are_refused():
    with pytest.raises(ConfigError, match=r"key/value heads: 3 .*tensor_parallel_size=2"):
        QKVParallelLinear(32, 6, 3, 8, context(tp=TPGroup(0, 2)))


def test_gated_mlp():
    layer = GatedMLP(16, 24, context(), bias=True)
    gate, up = normal(24, 16, seed=1), normal(24, 16, seed=2)
    for linear, shards in ((layer.gate_up_proj, {"gate": gate, "up": up}), (layer.down_proj, {None: normal(16, 24)})):
        for shard, weight in shards.items():
            linear.load_weight("weight", weight, shard)
            linear.load_weight("bias", torch.full((len(weight),), 0.5), shard)
        linear.finalize_weights()
    x = normal(3, 16, seed=3)
    inner = nn.functional.silu(x @ gate.T + 0.5) * (x @ up.T + 0.5)
    torch.testing.assert_close(layer(x), inner @ normal(16, 24).T + 0.5, rtol=1e-4, atol=1e-4)


# --- embedding and head --------------------------------------------------------------------


def test_embedding():
    layer = VocabParallelEmbedding(10, 4, context())
    assert layer.expected_weights() == {"weight": {None: (10, 4)}}
    layer.load_weight("weight", normal(10, 4), None)
    assert torch.equal(layer(torch.tensor([3, 0, 3])), normal(10, 4)[[3, 0, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tied_head_uses_the_embedding_and_wants_no_weight(dtype):
    ctx = context(dtype)
    embedding = VocabParallelEmbedding(48, 32, ctx)
    head = ParallelLMHead(48, 32, ctx, tied=embedding)
    assert head.expected_weights() == {}
    weight = normal(48, 32).to(dtype)
    embedding.load_weight("weight", weight, None)
    head.finalize_weights()
    embedding.finalize_weights()
    x = normal(5, 32, seed=1).to(dtype)
    torch.testing.assert_close(head(x), x @ weight.T)
    assert torch.equal(embedding(torch.arange(48)), weight)  # packing the head left it alone


def test_an_untied_head_has_its_own_weight():
    head = ParallelLMHead(48, 32, context())
    assert head.expected_weights() == {"weight": {None: (48, 32)}}
    head.load_weight("weight", normal(48, 32), None)
    head.finalize_weights()
    torch.testing.assert_close(head(torch.eye(32)), normal(48, 32).T)
