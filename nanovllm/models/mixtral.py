"""Mixtral (Jiang et al. 2024): Mistral with a mixture of experts in the place of the MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanovllm.build_context import BuildContext
from nanovllm.layers.embed_head import ParallelLMHead
from nanovllm.layers.moe import SparseMoE
from nanovllm.models.base import CausalLM
from nanovllm.models.config_reader import layer_windows, read_config, refuse_unless, rope_fields
from nanovllm.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaModel
from nanovllm.models.mistral import MistralConfig
from nanovllm.weights.rules import LLAMA_RULES, Pack, Rename, head_rules


@dataclass(frozen=True)
class MixtralConfig(MistralConfig):
    """Hugging Face's keys and defaults: Mistral's but for these."""

    rms_norm_eps: float = 1e-5
    num_experts_per_tok: int = 2
    num_local_experts: int = 8

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> MixtralConfig:
        refuse_unless(config, hidden_act="silu")
        heads = config.get("num_attention_heads") or cls.num_attention_heads
        hidden = config.get("hidden_size") or cls.hidden_size
        layers = config.get("num_hidden_layers") or cls.num_hidden_layers
        window = config.get("sliding_window")
        kinds = ["full_attention" if window is None else "sliding_attention"] * layers
        return read_config(
            cls,
            config,
            num_key_value_heads=config.get("num_key_value_heads", 8) or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            **rope_fields(config, cls.max_position_embeddings, 1e6),
            windows=layer_windows(kinds, layers, window),
        )


class MixtralForCausalLM(CausalLM):
    config_class = MixtralConfig

    def __init__(self, config: MixtralConfig, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        layers = (
            LlamaDecoderLayer(
                LlamaAttention(config, ctx, window=window),
                SparseMoE(
                    config.hidden_size,
                    config.intermediate_size,
                    config.num_local_experts,
                    config.num_experts_per_tok,
                    ctx,
                    normalise=True,
                ),
                config,
                ctx,
            )
            for window in config.windows
        )
        self.model = LlamaModel(layers, config, ctx)
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, ctx, tied=tied)
        self.weight_rules = [
            Rename(r"\.block_sparse_moe\.", ".mlp."),
            Pack("w1", "gate_up_proj", "gate"),
            Pack("w3", "gate_up_proj", "up"),
            Pack("w2", "down_proj", None),
            *LLAMA_RULES,
            *head_rules(config.tie_word_embeddings),
        ]
