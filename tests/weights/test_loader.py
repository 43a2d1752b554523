"""Strict loading: every problem is named by its name on disk."""

from __future__ import annotations

import pytest
import torch

from nanovllm.build_context import BuildContext
from nanovllm.errors import WeightError
from nanovllm.layers.weight_layer import WeightLayer
from nanovllm.models.llama import LlamaConfig, LlamaForCausalLM
from nanovllm.weights.checkpoint import HFCheckpoint
from nanovllm.weights.loader import fill_dummy_weights, load_weights
from nanovllm.weights.rules import Pack, Rename, Skip, Split, Transpose, disk_name, resolve
from nanovllm.weights.tensor_source import LazyTensor


def build(config: dict, dtype=torch.float32) -> LlamaForCausalLM:
    ctx = BuildContext(torch.device("cpu"), dtype, 64)
    return LlamaForCausalLM(LlamaConfig.from_hf(config), ctx)


@pytest.fixture
def disk(tiny_model):
    """config, and {name: tensor} of the tiny Llama."""
    checkpoint = HFCheckpoint(tiny_model("llama"))
    return checkpoint.config, {tensor.name: tensor.load() for tensor in checkpoint.tensors()}


def lazy(tensors: dict[str, torch.Tensor]) -> list[LazyTensor]:
    return [LazyTensor(name, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]


def load(config: dict, tensors: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    model = build(config)
    load_weights(model, lazy(tensors), model.weight_rules)
    return model


def message(config: dict, tensors: dict[str, torch.Tensor]) -> str:
    with pytest.raises(WeightError) as caught:
        load(config, tensors)
    return str(caught.value)


def test_every_tensor_lands_in_its_place_in_whatever_order(disk):
    config, tensors = disk
    shuffled = dict(reversed(tensors.items()))
    for model in (load(config, tensors), load(config, shuffled)):
        for i, layer in enumerate(model.model.layers):
            on_disk = {name.removeprefix(f"model.layers.{i}."): t for name, t in tensors.items() if f".{i}." in name}
            qkv = [on_disk[f"self_attn.{name}_proj.weight"] for name in "qkv"]
            gate_up = [on_disk[f"mlp.{name}_proj.weight"] for name in ("gate", "up")]
            assert torch.equal(layer.self_attn.qkv_proj.weight, torch.cat(qkv))
            assert torch.equal(layer.mlp.gate_up_proj.weight, torch.cat(gate_up))
            assert torch.equal(layer.mlp.down_proj.weight, on_disk["mlp.down_proj.weight"])
            assert torch.equal(layer.self_attn.o_proj.weight, on_disk["self_attn.o_proj.weight"])
            assert torch.equal(layer.input_layernorm.weight, on_disk["input_layernorm.weight"])
            assert torch.equal(layer.post_attention_layernorm.weight, on_disk["post_attention_layernorm.weight"])
        assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])
        assert torch.equal(model.model.norm.weight, tensors["model.norm.weight"])
        assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named_as_on_disk(disk, name):
    config, tensors = disk
    del tensors[name]
    found = message(config, tensors)
    assert f"1 missing: {name}" in found
    assert "qkv_proj" not in found and "gate_up_proj" not in found
    assert "unexpected" not in found and "misshapen" not in found


def test_an_unexpected_tensor_is_named(disk):
    config, tensors = disk
    tensors["model.layers.7.self_attn.q_proj.weight"] = torch.zeros(2)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    found = message(config, tensors)
    assert "2 unexpected: model.layers.7.self_attn.q_proj.weight, model.layers.0.self_attn.q_proj.bias" in found
    assert "missing" not in found


@pytest.mark.parametrize("shape", [(63, 64), (64,), (64, 64, 1), (32, 64)])
def test_a_misshapen_tensor_is_named_with_both_shapes(disk, shape):
    config, tensors = disk
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = torch.zeros(shape)
    assert f"1 misshapen: {name} (is {shape}, should be (64, 64))" in message(config, tensors)


def test_all_kinds_of_problems_are_told_at_once(disk):
    config, tensors = disk
    del tensors["model.norm.weight"]
    tensors["stray"] = torch.zeros(1)
    tensors["lm_head.weight"] = torch.zeros(3, 3)
    found = message(config, tensors)
    assert "1 missing: model.norm.weight" in found
    assert "1 unexpected: stray" in found
    assert "1 misshapen: lm_head.weight" in found


def test_twenty_are_listed_and_the_rest_counted(disk):
    config, _ = disk
    found = message(config, {})
    names = 3 * 9 + 3
    assert f"{names} missing: " in found and f" and {names - 20} more" in found
    assert found.count(".weight") == 20
    found = message(config, {f"stray.{i}": torch.zeros(1) for i in range(21)})
    assert "21 unexpected: " in found and "stray.19 and 1 more" in found and "stray.20" not in found


def test_exactly_twenty_are_listed_without_a_rest(disk):
    config, tensors = disk
    found = message(config, {**tensors, **{f"stray.{i}": torch.zeros(1) for i in range(20)}})
    assert "20 unexpected: " in found and "stray.19" in found and "more" not in found


def test_a_tensor_that_is_there_twice_is_unexpected(disk):
    config, tensors = disk
    model = build(config)
    twice = lazy(tensors) + lazy({"model.norm.weight": torch.zeros(64)})
    with pytest.raises(WeightError, match=r"1 unexpected: model\.norm\.weight"):
        load_weights(model, twice, model.weight_rules)


def unreadable() -> torch.Tensor:
    raise AssertionError("a skipped tensor was read")


def test_skipped_tensors_are_not_even_read(disk):
    config, tensors = disk
    model = build(config)
    skipped = LazyTensor("model.layers.0.self_attn.rotary_emb.inv_freq", (8,), unreadable)
    load_weights(model, [skipped, *lazy(tensors)], model.weight_rules)


def test_a_tied_head_on_disk_is_skipped(disk):
    config, tensors = disk
    config = {**config, "tie_word_embeddings": True}
    model = load(config, tensors)
    embedding = tensors["model.embed_tokens.weight"]
    assert not torch.equal(tensors["lm_head.weight"], embedding)
    torch.testing.assert_close(model.compute_logits(torch.eye(64)), embedding.T)
    del tensors["lm_head.weight"]
    load(config, tensors)


def test_biases_are_loaded_where_the_config_has_them(tiny_model):
    checkpoint = HFCheckpoint(tiny_model("llama3"))
    tensors = {tensor.name: tensor.load() for tensor in checkpoint.tensors()}
    model = load(checkpoint.config, tensors)
    wanted = torch.cat([tensors[f"model.layers.2.self_attn.{name}_proj.bias"] for name in "qkv"])
    assert torch.equal(model.model.layers[2].self_attn.qkv_proj.bias, wanted)
    del tensors["model.layers.2.mlp.gate_proj.bias"]
    assert "1 missing: model.layers.2.mlp.gate_proj.bias" in message(checkpoint.config, tensors)


def test_weights_are_converted_to_the_models_type(disk):
    config, tensors = disk
    model = build(config, torch.bfloat16)
    load_weights(model, lazy({name: t.half() for name, t in tensors.items()}), model.weight_rules)
    wanted = tensors["model.norm.weight"].half().bfloat16()
    assert torch.equal(model.model.norm.weight, wanted)


def dummy(config: dict, seed: int) -> dict[str, torch.Tensor]:
    model = build(config)
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    fill_dummy_weights(model, seed)
    return dict(model.named_parameters())


def test_dummy_weights_are_seeded_and_fill_everything(disk):
    config, _ = disk
    first, again, other = dummy(config, 1), dummy(config, 1), dummy(config, 2)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), name
        assert not torch.equal(parameter, other[name]), name
        assert parameter.isfinite().all(), name
        middle = 1.0 if parameter.ndim == 1 else 0.0
        assert abs(parameter.mean() - middle) < 0.1 and 0 < parameter.std() < 0.1
    first_layer = first["model.layers.0.self_attn.qkv_proj.weight"]
    assert not torch.equal(first_layer, first["model.layers.1.self_attn.qkv_proj.weight"])


RULES = [
    Rename(r"^old\.", "new."),
    Skip("*.inv_freq"),
    Skip("vision.*"),
    Pack("q_proj", "qkv_proj", "q"),
    Pack("attn.k_proj", "qkv_proj", "k"),
    Pack("gate", "gate_up", "gate"),
    Split("query_key_value", (("qkv_proj", "q"), ("qkv_proj", "k"), ("out", None)), lambda t: t.chunk(3)),
    Transpose("c_proj"),
]


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("layers.0.q_proj.weight", [("layers.0.qkv_proj.weight", "q")]),
        ("layers.0.attn.k_proj.bias", [("layers.0.qkv_proj.bias", "k")]),
        ("layers.0.xattn.k_proj.bias", [("layers.0.xattn.k_proj.bias", None)]),
        ("layers.0.xq_proj.weight", [("layers.0.xq_proj.weight", None)]),
        ("layers.0.gate.weight", [("layers.0.gate_up.weight", "gate")]),
        ("norm.weight", [("norm.weight", None)]),
        ("layers.0.rotary.inv_freq", None),
        ("vision.layer.weight", None),
        ("a.vision.layer.weight", [("a.vision.layer.weight", None)]),
        ("old.old.q_proj.weight", [("new.old.qkv_proj.weight", "q")]),
        (
            "0.query_key_value.bias",
            [("0.qkv_proj.bias", "q"), ("0.qkv_proj.bias", "k"), ("0.out.bias", None)],
        ),
        ("0.c_proj.weight", [("0.c_proj.weight", None)]),
    ],
)
def test_rules(name, targets):
    found = resolve(name, RULES)
    assert (found and list(found.targets)) == targets


@pytest.mark.parametrize(
    ("parameter", "shard", "name"),
    [
        ("0.qkv_proj.weight", "q", "0.q_proj.weight"),
        ("0.qkv_proj.weight", "k", "0.attn.k_proj.weight"),
        ("0.gate_up.weight", "gate", "0.gate.weight"),
        ("0.out.bias", None, "0.query_key_value.bias"),
        ("norm.weight", None, "norm.weight"),
    ],
)
def test_names_on_disk_for_messages(parameter, shard, name):
    assert disk_name(parameter, shard, RULES) == name


class Plain(WeightLayer):
    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.add_parameter(name, shape, torch.float32, torch.device("cpu"))


class Fused(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = Plain(weight=(2, 3), bias=(2,))
        self.k = Plain(weight=(2, 3), bias=(2,))
        self.out = Plain(weight=(3, 4))


FUSED_RULES = [Split("qk", (("q", None), ("k", None)), lambda t: t.chunk(2)), Transpose("out")]


def test_split_and_transposed_tensors():
    model, values = Fused(), torch.arange(12.0).view(4, 3)
    load_weights(model, lazy({"qk.weight": values, "qk.bias": torch.arange(4.0), "out.weight": values}), FUSED_RULES)
    assert torch.equal(model.q.weight, values[:2]) and torch.equal(model.k.weight, values[2:])
    assert torch.equal(model.q.bias, torch.arange(2.0)) and torch.equal(model.k.bias, torch.arange(2.0, 4.0))
    assert torch.equal(model.out.weight, values.t())


def test_misshapen_before_it_is_split():
    tensors = {"qk.weight": torch.zeros(5, 3), "qk.bias": torch.zeros(1), "out.weight": torch.zeros(3, 4)}
    with pytest.raises(WeightError) as caught:
        load_weights(Fused(), lazy(tensors), FUSED_RULES)
    for expected in (
        "3 misshapen: qk.weight (is (5, 3), should give (2, 3), (2, 3))",
        "qk.bias (is (1,), should give (2,), (2,))",
        "out.weight (is (3, 4), should be (4, 3))",
    ):
        assert expected in str(caught.value)
