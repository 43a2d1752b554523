"""`nanovllm parity`: that it agrees where it should, and names the place where it does not."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from nanovllm.attention.cpu import CPUAttention
from nanovllm.cli.main import main
from nanovllm.models.base import CausalLM


@pytest.fixture
def parity(capsys):
    def run(*argv: str) -> tuple[int, str]:
        status = main(["parity", *map(str, argv)])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


@pytest.fixture
def damage(monkeypatch):
    """damage(parameter): change it in our model alone, after loading."""

    def apply(parameter: str, rows: slice = slice(None)) -> None:
        load = CausalLM.load

        def load_and_damage(model, checkpoint):
            load(model, checkpoint)
            target = model.get_parameter(parameter)
            target[rows] += 0.3 * torch.randn_like(target[rows])

        monkeypatch.setattr(CausalLM, "load", load_and_damage)

    return apply


HYBRID = {"model_type": "granitemoehybrid", "num_hidden_layers": 32, "layer_types": ["mamba"] * 31 + ["attention"]}
HYBRID |= {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4, "shared_intermediate_size": 2048}
HYBRID |= {"mamba_n_heads": 48, "mamba_d_head": 32, "mamba_d_state": 128, "mamba_n_groups": 1, "num_local_experts": 0}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text", "gpt2", "mpt", "falcon", "granitemoehybrid"])
def test_random_models_agree(parity, tmp_path, family):
    source = family
    if family == "granitemoehybrid":  # transformers' default has no attention layer and does not generate
        (tmp_path / "config.json").write_text(json.dumps(HYBRID))
        source = tmp_path
    status, out = parity("--random", source, "--layers")
    assert status == 0, out
    assert out.count("32 of 32") == 3
    assert "agrees with transformers: the tolerance is 0.0001" in out
    assert "first to differ" not in out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_has_tolerances_of_its_own(parity, dtype):
    status, out = parity("--random", "llama", "--dtype", dtype, "--max-tokens", "4")
    assert status == 0, out
    assert parity("--random", "llama", "--dtype", dtype, "--max-tokens", "4", "--tolerance", "1e-6")[0] == 1


def test_texts_through_the_tokenizer(parity, chat_model):
    status, out = parity(chat_model, "--prompt", "hello", "--prompt", "you", "--max-tokens", "4")
    assert status == 0, out
    assert out.count("4 of 4") == 2
    assert "    9 " in out  # five bytes and four tokens
    assert "'hello'" in out
    status, out = parity(chat_model, "--max-tokens", "2")
    assert "The capital of France" in out


def test_texts_need_a_tokenizer(parity, tiny_model):
    status, out = parity(tiny_model("llama"), "--prompt", "hello")
    assert status == 2
    assert "tokenizer.json" in out


@pytest.mark.parametrize(
    ("family", "parameter", "rows", "named"),
    [
        ("llama", "model.layers.1.mlp.down_proj.weight", slice(None), "model.layers.1.mlp.down_proj"),
        ("llama", "model.layers.2.self_attn.qkv_proj.weight", slice(0, 64), "model.layers.2.self_attn.q_proj"),
        ("llama", "model.layers.0.self_attn.qkv_proj.weight", slice(96, 128), "model.layers.0.self_attn.v_proj"),
        ("llama", "model.layers.1.mlp.gate_up_proj.weight", slice(96, 192), "model.layers.1.mlp"),
        ("llama", "model.layers.1.input_layernorm.weight", slice(None), "model.layers.1.input_layernorm"),
        ("llama", "model.embed_tokens.weight", slice(None), "model.embed_tokens"),
        ("llama", "model.norm.weight", slice(None), "model.norm"),
        ("llama", "lm_head.weight", slice(None), "lm_head"),
        ("gpt2", "transformer.h.1.attn.c_attn.weight", slice(None), "transformer.h.1.attn.c_attn"),
        ("gemma3", "model.layers.1.self_attn.q_norm.weight", slice(None), "model.layers.1.self_attn.q_norm"),
        ("mpt", "transformer.blocks.1.ffn.down_proj.weight", slice(None), "transformer.blocks.1.ffn.down_proj"),
        ("falcon-40b", "transformer.h.1.self_attention.query_key_value.weight", slice(None),
         "transformer.h.1.self_attention.query_key_value"),
    ],
)  # fmt: skip
def test_a_damaged_module_is_named(parity, tiny_model, damage, family, parameter, rows, named):
    damage(parameter, rows)  # rows of a weight that is not packed
    torchs = ("--kernels", "torch", "--max-tokens", "4")
    status, out = parity(tiny_model(family), "--layers", *torchs)
    assert status == 1
    assert f"first to differ: {named}, by " in out
    assert "differs from transformers" in out
    assert parity(tiny_model(family), *torchs)[0] == 1


def test_a_mistake_between_modules_is_named_by_what_is_around_it(parity, tiny_model, monkeypatch):
    monkeypatch.setattr("nanovllm.models.llama.apply_rotary", lambda x, *rope: x)
    status, out = parity(tiny_model("llama"), "--layers", "--max-tokens", "4")
    assert status == 1
    assert "first to differ: model.layers.0.self_attn, by " in out


def test_a_mistake_in_decoding_alone_is_seen_in_the_text(parity, tiny_model, monkeypatch):
    """The logits of whole prompts are right, and yet the engine writes something else."""
    forward = CPUAttention.forward

    def wrong(self, q, k, v, kv, batch, **options):
        out = forward(self, q, k, v, kv, batch, **options)
        return out * 0 if batch.max_query_len == 1 and batch.max_seq_len > 3 else out

    monkeypatch.setattr(CPUAttention, "forward", wrong)
    status, out = parity(tiny_model("llama"), "--attention-backend", "cpu")
    assert status == 1
    assert "then a gap of" in out


def test_positions_that_do_not_suffice_are_refused_first(parity, tiny_model, monkeypatch):
    monkeypatch.setattr("nanovllm.cli.parity.Reference", lambda *args: pytest.fail("loaded"))
    status, out = parity(tiny_model("llama"), "--max-tokens", "500")
    assert status == 2
    assert "541 tokens of 512 positions; lower --max-tokens" in out


def test_layers_of_other_names_are_not_compared(parity):
    """The fallback is made of transformers' own modules."""
    status, out = parity("--random", "llama", "--layers", "--model-impl", "transformers", "--max-tokens", "2")
    assert status == 0, out
    assert "other names here" in out


def test_without_transformers(parity, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, out = parity("--random", "llama")
    assert status == 2
    assert "pip install 'nanovllm[transformers]'" in out


def test_a_hybrid_by_its_type_alone(parity):
    """transformers' default has Mamba layers alone, and its generate() fails on that."""
    assert parity("--random", "granitemoehybrid", "--max-tokens", "4")[0] == 0


def test_what_cannot_be_random(parity, tmp_path):
    status, out = parity("--random", "no-such-type")
    assert status == 2
    assert "--random no-such-type: " in out
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    assert parity("--random", tmp_path)[0] == 2
