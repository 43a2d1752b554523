"""The arithmetic of `nanovllm plan` against what a loaded engine allocates."""

from __future__ import annotations

import json

import pytest
from tiny_models import TINY, make_tiny_model

from nanovllm import LLM, ConfigError
from nanovllm.config import EngineConfig
from nanovllm.engine.build import find_model
from nanovllm.engine.runner import caches as engine_caches
from nanovllm.engine.runner.memory_plan import footprint, plan_memory
from nanovllm.weights.checkpoint import open_checkpoint

CACHES = 8 * 2**20


def planned(path, tp=1, **options):
    checkpoint = open_checkpoint(path)
    asked = EngineConfig(str(path), **options)
    family, model_config = find_model(asked, checkpoint)
    config = asked.resolve(
        checkpoint_dtype=checkpoint.dtype, max_positions=model_config.max_position_embeddings, cuda=False
    )
    return footprint(family, model_config, config, tp), config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", TINY)
def test_a_loaded_engine_allocates_what_was_planned(tiny_model, family, dtype, monkeypatch):
    caches = []
    zeros = engine_caches._zeros

    def counted(*args):
        caches.append(zeros(*args))
        return caches[-1]

    monkeypatch.setattr(engine_caches, "_zeros", counted)
    path = tiny_model(family)
    model, config = planned(path, dtype=dtype, max_num_seqs=5)
    plan = plan_memory(model, config, model.weights + model.tables + CACHES)
    options = {"dtype": dtype, "max_num_seqs": 5, "kvcache_memory": CACHES}
    with LLM(str(path), skip_tokenizer_init=True, **options) as llm:
        (weights,) = llm.apply_model(lambda m: {id(p): p.numel() * p.itemsize for p in m.parameters()})
        (tables,) = llm.apply_model(lambda m: sum(b.nbytes for b in m.buffers()))
        assert (model.weights, model.tables) == (sum(weights.values()), tables)
        assert sum(c.nbytes for c in caches) == plan.num_bytes
        assert plan.num_bytes == (
            plan.num_blocks * config.kvcache_block_size * model.kv_bytes_per_token + plan.num_slots * model.state_bytes
        )


def test_nothing_is_allocated_for_a_plan(tmp_path):
    """Llama 3 70B: its weights are more than most machines have."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    sizes |= {"num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **sizes}))
    model, _ = planned(tmp_path, dtype="bfloat16", kernels="torch")
    assert model.weights == 2 * 70_553_706_496
    assert model.kv_bytes_per_token == 2 * 80 * 8 * 128 * 2


def test_ranks_share_linear_layers_vocabulary_and_heads(tmp_path):
    """The vocabulary of 131 is padded to 132; norms are on every rank."""
    path = make_tiny_model("qwen2", tmp_path, intermediate_size=102)
    (one, _), (third, config) = (planned(path, tp, kernels="torch") for tp in (1, 3))
    hidden, layers = 60, 3
    norms = (2 * layers + 1) * hidden * 4
    assert (one.replicated, third.replicated) == ({}, {"RMSNorm": norms})
    embedding_and_head = 2 * 131 * hidden * 4
    sharded = one.weights - embedding_and_head - norms
    assert third.weights == sharded // 3 + 2 * (132 // 3) * hidden * 4 + norms
    assert third.kv_bytes_per_token * 3 == one.kv_bytes_per_token
    assert plan_memory(third, config, 2**20).num_blocks > plan_memory(one, config, 2**20).num_blocks


def test_experts_are_divided_one_way_or_the_other(tiny_model):
    """Five experts: a third of each on every rank, or two of them on the ranks that have most."""
    path = tiny_model("qwen3-moe-window")
    (rows, _), (whole, _) = (planned(path, 3, kernels="torch", enable_expert_parallel=way) for way in (False, True))
    expert = 3 * 36 * 48 * 4  # bytes
    assert whole.weights - rows.weights == 2 * expert - 5 * expert // 3  # in the one layer of two that has experts
    assert whole.replicated == rows.replicated


@pytest.mark.parametrize(
    ("family", "tp", "message"),
    [
        ("llama", 8, "query heads: 4 does not divide by tensor_parallel_size=8; sizes that can: 1, 2, 4"),
        ("falcon-7b", 7, "columns of a projection: 60 does not"),
        ("falcon-40b", 3, "query heads: 8"),
        ("granite", 3, "rows of a gate: 101 does not divide"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_numbers(tiny_model, family, tp, message):
    with pytest.raises(ConfigError, match=message):
        planned(tiny_model(family), tp)


def test_weights_beyond_the_memory_are_refused(tiny_model):
    model, config = planned(tiny_model("llama"))
    with pytest.raises(ConfigError, match=f"the weights take {model.weights + model.tables:,} bytes"):
        plan_memory(model, config, model.weights)
