"""Granite 3, dense (IBM Granite team 2024): Llama with four multipliers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanovllm.batch import Batch
from nanovllm.build_context import BuildContext
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.rotary_embedding import Rope, RopeConfig, RotaryEmbedding
from nanovllm.models.base import CausalLM
from nanovllm.models.config_reader import read_config, refuse_unless, rope_fields
from nanovllm.models.llama import LlamaAttention
from nanovllm.weights.rules import LLAMA_RULES, head_rules


@dataclass(frozen=True)
class GraniteConfig:
    """Hugging Face's keys and defaults. attention_multiplier is the softmax scale itself."""

    num_key_value_heads: int
    head_dim: int
    rope: RopeConfig
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> GraniteConfig:
        refuse_unless(config, hidden_act="silu")
        heads = config.get("num_attention_heads") or cls.num_attention_heads
        hidden = config.get("hidden_size") or cls.hidden_size
        return read_config(
            cls,
            config,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            **rope_fields(config, cls.max_position_embeddings),
        )


def granite_attention(config: GraniteConfig, ctx: BuildContext) -> LlamaAttention:
    bias = config.attention_bias
    return LlamaAttention(config, ctx, qkv_bias=bias, o_bias=bias, scale=config.attention_multiplier)


class GraniteDecoderLayer(nn.Module):
    def __init__(self, config: GraniteConfig, ctx: BuildContext) -> None:
        super().__init__()
        self.self_attn = granite_attention(config, ctx)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, ctx, bias=config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ctx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ctx)
        self._multiplier = config.residual_multiplier

    def forward(self, x: torch.Tensor, rope: Rope, batch: Batch) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, batch) * self._multiplier
        return x + self.mlp(self.post_attention_layernorm(x)) * self._multiplier


class GraniteModel(nn.Module):
    """layers: of this family or of GraniteMoe."""

    def __init__(self, layers: Iterable[nn.Module], config: GraniteConfig, ctx: BuildContext) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, ctx)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ctx)
        self.rotary_emb = RotaryEmbedding(config.head_dim, config.rope, ctx)
        self._multiplier = config.embedding_multiplier

    def forward(self, batch: Batch) -> torch.Tensor:
        x = self.embed_tokens(batch.input_ids) * self._multiplier  # [T, hidden]
        rope = self.rotary_emb(batch.positions)
        for layer in self.layers:
            x = layer(x, rope, batch)
        return self.norm(x)


class GraniteForCausalLM(CausalLM):
    config_class = GraniteConfig

    def __init__(self, config: GraniteConfig, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        layers = (GraniteDecoderLayer(config, ctx) for _ in range(config.num_hidden_layers))
        self.model = GraniteModel(layers, config, ctx)
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, ctx, tied=tied)
        self.weight_rules = [*LLAMA_RULES, *head_rules(config.tie_word_embeddings)]
        self._logits_scaling = config.logits_scaling

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().compute_logits(hidden) / self._logits_scaling
