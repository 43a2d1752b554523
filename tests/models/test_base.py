"""What every model's class does alike."""

import pytest

from nanovllm.errors import ModelNotSupported
from nanovllm.models.registry import model_class


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("LlamaForCausalLM", {"num_attention_heads": "many"}),
        ("LlamaForCausalLM", {"rope_scaling": 4}),
        ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 0, "mlp_only_layers": 3}),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": 0}),
        ("FalconForCausalLM", {"rope_parameters": [1]}),
    ],
)
def test_a_config_with_a_wrong_value_is_refused_by_name(architecture, config):
    with pytest.raises(ModelNotSupported, match=r"config\.json: "):
        model_class([architecture]).read_config(config)
