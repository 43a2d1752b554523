"""Qwen3, dense (Qwen team 2025): Llama with per-head RMSNorm on queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanovllm.batch import Batch
from nanovllm.build_context import BuildContext
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import QKVParallelLinear, RowParallelLinear
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.rotary_embedding import RopeConfig, RotaryEmbedding, apply_rotary
from nanovllm.models.base import CausalLM
from nanovllm.models.config_reader import read_config, refuse_unless
from nanovllm.weights.rules import LLAMA_RULES, head_rules


@dataclass(frozen=True)
class Qwen3Config:
    """Hugging Face's keys and defaults."""

    rope: RopeConfig
    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128  # its own key: not hidden_size / num_attention_heads
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Qwen3Config:
        refuse_unless(config, hidden_act="silu", use_sliding_window=False)
        return read_config(cls, config, rope=RopeConfig.from_hf(config))


class Qwen3Attention(nn.Module):
    def __init__(self, config: Qwen3Config, ctx: BuildContext) -> None:
        super().__init__()
        heads, kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        bias = config.attention_bias
        self.num_heads, self.num_kv_heads = heads // ctx.tp.size, kv_heads // ctx.tp.size
        self.qkv_proj = QKVParallelLinear(config.hidden_size, heads, kv_heads, self.head_dim, ctx, bias=bias)
        self.o_proj = RowParallelLinear(heads * self.head_dim, config.hidden_size, ctx, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, ctx)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, ctx)
        self.attn = Attention(self.num_heads, self.num_kv_heads, self.head_dim, ctx, scale=self.head_dim**-0.5)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], batch: Batch) -> torch.Tensor:
        heads = self.qkv_proj(x).unflatten(1, (-1, self.head_dim))  # [T, H + 2 KH, D]
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        q = apply_rotary(self.q_norm(q), *rope)  # the norm comes before the rotation
        k = apply_rotary(self.k_norm(k), *rope)
        return self.o_proj(self.attn(q, k, v, batch))


class Qwen3DecoderLayer(nn.Module):
    def __init__(self, config: Qwen3Config, ctx: BuildContext) -> None:
        super().__init__()
        self.self_attn = Qwen3Attention(config, ctx)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, ctx)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ctx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ctx)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], batch: Batch) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, batch)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Model(nn.Module):
    def __init__(self, config: Qwen3Config, ctx: BuildContext) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, ctx)
        self.layers = nn.ModuleList(Qwen3DecoderLayer(config, ctx) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ctx)
        self.rotary_emb = RotaryEmbedding(config.head_dim, config.rope, ctx)

    def forward(self, batch: Batch) -> torch.Tensor:
        x = self.embed_tokens(batch.input_ids)  # [T, hidden]
        rope = self.rotary_emb(batch.positions)
        for layer in self.layers:
            x = layer(x, rope, batch)
        return self.norm(x)


class Qwen3ForCausalLM(CausalLM):
    config_class = Qwen3Config

    def __init__(self, config: Qwen3Config, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        self.model = Qwen3Model(config, ctx)
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, ctx, tied=tied)
        self.weight_rules = [*LLAMA_RULES, *head_rules(config.tie_word_embeddings)]
