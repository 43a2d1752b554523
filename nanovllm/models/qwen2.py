"""Qwen2 and Qwen2.5, dense (Yang et al. 2024): Llama with biases on queries, keys and values."""

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
class Qwen2Config:
    """Hugging Face's keys and defaults. windows: of each layer, see `qwen_windows`."""

    num_key_value_heads: int
    head_dim: int
    rope: RopeConfig
    windows: tuple[int | None, ...]
    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Qwen2Config:
        refuse_unless(config, hidden_act="silu")
        heads = config.get("num_attention_heads") or cls.num_attention_heads
        hidden = config.get("hidden_size") or cls.hidden_size
        return read_config(
            cls,
            config,
            num_key_value_heads=config.get("num_key_value_heads", 32) or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            **rope_fields(config, cls.max_position_embeddings),
            windows=qwen_windows(config, config.get("num_hidden_layers") or cls.num_hidden_layers),
        )


def qwen_windows(config: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Off unless `use_sliding_window`; then layers from `max_window_layers` on see `sliding_window` tokens."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = num_layers if window is None else config.get("max_window_layers", 28)
    kinds = ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]
    return layer_windows(config.get("layer_types") or kinds, num_layers, window)


class Qwen2ForCausalLM(CausalLM):
    config_class = Qwen2Config

    def __init__(self, config: Qwen2Config, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        layers = (
            LlamaDecoderLayer(
                LlamaAttention(config, ctx, qkv_bias=True, window=window),
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
