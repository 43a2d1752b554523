"""Mistral, Mistral Nemo and Ministral (Jiang et al. 2023): Llama with sliding-window attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanovllm.build_context import BuildContext
from nanovllm.layers.embed_head import ParallelLMHead
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.rotary_embedding import RopeConfig
from nanovllm.models.base import CausalLM
from nanovllm.models.config_reader import layer_windows, read_config, refuse_unless, rope_fields
from nanovllm.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaModel
from nanovllm.weights.rules import LLAMA_RULES, head_rules


@dataclass(frozen=True)
class MistralConfig:
    """Hugging Face's keys and defaults. windows: of each layer."""

    num_key_value_heads: int
    head_dim: int
    rope: RopeConfig
    windows: tuple[int | None, ...]
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> MistralConfig:
        refuse_unless(config, hidden_act="silu")
        heads = config.get("num_attention_heads") or cls.num_attention_heads
        hidden = config.get("hidden_size") or cls.hidden_size
        layers = config.get("num_hidden_layers") or cls.num_hidden_layers
        window = config.get("sliding_window", 4096)  # absent is 4096, null is none
        kinds = ["full_attention" if window is None else "sliding_attention"] * layers
        return read_config(
            cls,
            config,
            num_key_value_heads=config.get("num_key_value_heads", 8) or heads,
            head_dim=config.get("head_dim") or hidden // heads,  # Nemo has its own
            **rope_fields(config, cls.max_position_embeddings),
            windows=layer_windows(config.get("layer_types") or kinds, layers, window),  # Ministral has layer_types
        )


class MistralForCausalLM(CausalLM):
    config_class = MistralConfig

    def __init__(self, config: MistralConfig, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        layers = (
            LlamaDecoderLayer(
                LlamaAttention(config, ctx, window=window),
                GatedMLP(config.hidden_size, config.intermediate_size, ctx),
                config,
                ctx,
            )
            for window in config.windows
        )
        self.model = LlamaModel(layers, config, ctx)
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, ctx, tied=tied)
        self.weight_rules = [*LLAMA_RULES, *head_rules(config.tie_word_embeddings)]
