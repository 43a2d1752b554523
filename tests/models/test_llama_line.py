"""Llama and the families that are like it: their configs, of both generations, against transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from checks import other_defaults

from nanovllm.errors import ModelNotSupported
from nanovllm.models.base import CausalLM
from nanovllm.models.gemma3 import Gemma3ForCausalLM
from nanovllm.models.granite import GraniteForCausalLM
from nanovllm.models.granitemoe import GraniteMoeForCausalLM
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.mistral import MistralForCausalLM
from nanovllm.models.mixtral import MixtralForCausalLM
from nanovllm.models.qwen2 import Qwen2ForCausalLM
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.models.qwen3_moe import Qwen3MoeForCausalLM

# transformers' config; our fields that it does not have, or not in our form
FAMILIES: dict[type[CausalLM], tuple[Any, set[str]]] = {
    LlamaForCausalLM: (transformers.LlamaConfig, {"rope"}),
    Qwen2ForCausalLM: (transformers.Qwen2Config, {"rope", "windows", "head_dim"}),
    Qwen3ForCausalLM: (transformers.Qwen3Config, {"rope", "windows"}),
    Qwen3MoeForCausalLM: (transformers.Qwen3MoeConfig, {"rope", "windows", "head_dim", "mlp_only_layers"}),
    MistralForCausalLM: (transformers.MistralConfig, {"rope", "windows"}),
    MixtralForCausalLM: (transformers.MixtralConfig, {"rope", "windows", "head_dim"}),
    GraniteForCausalLM: (transformers.GraniteConfig, {"rope", "head_dim"}),
    GraniteMoeForCausalLM: (transformers.GraniteMoeSharedConfig, {"rope", "head_dim", "mlp_bias"}),
    Gemma3ForCausalLM: (transformers.Gemma3TextConfig, {"rope", "local_rope", "windows"}),
}
by_family = pytest.mark.parametrize("model", FAMILIES, ids=lambda model: model.__name__)


def their_windows(config: Any) -> tuple[int | None, ...]:
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds)


@by_family
def test_defaults_are_those_of_transformers(model):
    their_class, derived = FAMILIES[model]
    theirs, ours = their_class(), model.config_class.from_hf({})
    assert other_defaults(model, theirs) == derived
    if model is Gemma3ForCausalLM:
        bases = {"full_attention": ours.rope.theta, "sliding_attention": ours.local_rope.theta}
        assert bases == {kind: rope["rope_theta"] for kind, rope in theirs.rope_parameters.items()}
    else:
        assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    if "head_dim" in derived:
        assert ours.head_dim == theirs.hidden_size // theirs.num_attention_heads
    if "windows" in derived:
        assert ours.windows == their_windows(theirs)


@by_family
def test_both_generations_of_config_say_the_same(model):
    old = {
        "hidden_size": 60,
        "num_attention_heads": 6,
        "num_hidden_layers": 5,
        "rope_theta": 5000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "sliding_window": 7,
        "use_sliding_window": True,
        "max_window_layers": 2,
    }
    if model is Gemma3ForCausalLM:
        old |= {"sliding_window_pattern": 3, "rope_local_base_freq": 300.0}
        old["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}  # transformers loses a "type" here
    if model is Qwen3MoeForCausalLM:
        old |= {"num_experts": 3, "mlp_only_layers": [1]}
    new = FAMILIES[model][0](**old).to_dict()
    assert "rope_scaling" not in new and ("num_local_experts" in new or model is not Qwen3MoeForCausalLM)
    assert model.config_class.from_hf(new) == model.config_class.from_hf(old)
    assert model.config_class.from_hf(new).rope.scaling["factor"] == 2.0


def test_gemma3_scales_the_rope_of_its_global_layers_only():
    config = Gemma3ForCausalLM.config_class.from_hf({"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert config.rope.scaling == {"rope_type": "linear", "factor": 8.0}
    assert config.local_rope.scaling == {"rope_type": "default"}


@by_family
def test_null_key_value_heads_are_as_many_as_query_heads(model):
    if model is Gemma3ForCausalLM:
        return  # may not be null
    config = model.config_class.from_hf({"num_key_value_heads": None, "num_attention_heads": 6, "hidden_size": 60})
    assert config.num_key_value_heads == 6


QWEN = {"num_hidden_layers": 6, "sliding_window": 9, "max_window_layers": 4}
SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (Qwen2ForCausalLM, QWEN),
        (Qwen2ForCausalLM, QWEN | {"use_sliding_window": True}),
        (Qwen2ForCausalLM, {"use_sliding_window": True}),
        (Qwen2ForCausalLM, QWEN | {"use_sliding_window": True, "sliding_window": None}),
        (Qwen3ForCausalLM, QWEN),
        (Qwen3ForCausalLM, QWEN | {"use_sliding_window": True, "max_window_layers": 0}),
        (Qwen3ForCausalLM, QWEN | {"use_sliding_window": True, "layer_types": [SLIDING, FULL] * 3}),
        (Qwen3MoeForCausalLM, QWEN),
        (Qwen3MoeForCausalLM, QWEN | {"use_sliding_window": True}),
        (MistralForCausalLM, {"sliding_window": None}),
        (MistralForCausalLM, {"sliding_window": 9}),
        (MixtralForCausalLM, {"sliding_window": 9}),
        (Gemma3ForCausalLM, {"sliding_window": 9, "sliding_window_pattern": 4}),
        (Gemma3ForCausalLM, {"num_hidden_layers": 2, "layer_types": [FULL, SLIDING]}),
    ],
)
def test_windows_are_those_of_transformers(model, config):
    assert model.config_class.from_hf(config).windows == their_windows(FAMILIES[model][0](**config))


def test_mistral_with_layer_types_is_ministral():
    config = {"num_hidden_layers": 3, "sliding_window": 9, "layer_types": [SLIDING, FULL, SLIDING]}
    assert MistralForCausalLM.config_class.from_hf(config).windows == (9, None, 9)
    assert their_windows(transformers.MinistralConfig(**config)) == (9, None, 9)


@pytest.mark.parametrize(
    "config",
    [{}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [0, 3]}, {"num_experts": 0}, {"num_local_experts": 0}],
)
def test_qwen3_moe_has_experts_where_transformers_has_them(config):
    sizes = {"hidden_size": 8, "moe_intermediate_size": 4, "intermediate_size": 4, "vocab_size": 8, "head_dim": 2}
    config = {"num_hidden_layers": 5, "num_attention_heads": 4, "num_experts_per_tok": 1, **sizes, **config}
    theirs = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**config))
    has_experts = [type(layer.mlp).__name__ == "Qwen3MoeSparseMoeBlock" for layer in theirs.model.layers]
    ours = Qwen3MoeForCausalLM.config_class.from_hf(config)
    assert [ours.has_experts(i) for i in range(5)] == has_experts


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        *((model, {"hidden_act": "gelu"}, "hidden_act='gelu'") for model in FAMILIES if model is not Gemma3ForCausalLM),
        (LlamaForCausalLM, {"pretraining_tp": 2}, "pretraining_tp=2"),
        (Qwen2ForCausalLM, {"num_hidden_layers": 2, "layer_types": [FULL, "chunked_attention"]}, "chunked_attention"),
        (Qwen3ForCausalLM, {"num_hidden_layers": 3, "layer_types": [FULL, FULL]}, "2 layers of 3"),
        (Qwen3ForCausalLM, {"num_hidden_layers": 2, "layer_types": [FULL, SLIDING]}, "need a sliding_window, got None"),
        (MistralForCausalLM, {"sliding_window": 0}, "need a sliding_window, got 0"),
        (Gemma3ForCausalLM, {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        (Gemma3ForCausalLM, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        (Gemma3ForCausalLM, {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ],
)
def test_refused_variants(model, config, message):
    with pytest.raises(ModelNotSupported, match=message):
        model.config_class.from_hf(config)
