"""Qwen3, dense (Qwen team 2025): Llama with per-head RMSNorm on queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanovllm.batch import Batch
from nanovllm.build_context import BuildContext
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import QKVParallelLinear, RowParallelLinear
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.rotary_embedding import Rope, RopeConfig, apply_normed_rotary
from nanovllm.models.base import CausalLM
from nanovllm.models.config_reader import read_config, refuse_unless, rope_fields
from nanovllm.models.llama import LlamaDecoderLayer, LlamaModel
from nanovllm.models.qwen2 import qwen_windows
from nanovllm.weights.rules import LLAMA_RULES, head_rules


@dataclass(frozen=True)
class Qwen3Config:
    """Hugging Face's keys and defaults. windows: of each layer, see `qwen_windows`."""

    num_key_value_heads: int
    rope: RopeConfig
    windows: tuple[int | None, ...]
    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    head_dim: int = 128  # its own key: not hidden_size / num_attention_heads
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Qwen3Config:
        refuse_unless(config, hidden_act="silu")
        heads = config.get("num_attention_heads") or cls.num_attention_heads
        return read_config(
            cls,
            config,
            num_key_value_heads=config.get("num_key_value_heads", 32) or heads,
            **rope_fields(config, cls.max_position_embeddings),
            windows=qwen_windows(config, config.get("num_hidden_layers") or cls.num_hidden_layers),
        )


class Qwen3Attention(nn.Module):
    def __init__(self, config: Qwen3Config, window: int | None, ctx: BuildContext) -> None:
        super().__init__()
        heads, kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        bias = config.attention_bias
        self.qkv_proj = QKVParallelLinear(config.hidden_size, heads, kv_heads, self.head_dim, ctx, bias=bias)
        self.num_heads, self.num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.o_proj = RowParallelLinear(heads * self.head_dim, config.hidden_size, ctx, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, ctx)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, ctx)
        scale = self.head_dim**-0.5
        self.attn = Attention(self.num_heads, self.num_kv_heads, self.head_dim, ctx, scale=scale, window=window)

    def forward(self, x: torch.Tensor, rope: Rope, batch: Batch, residual: torch.Tensor | None = None) -> torch.Tensor:
        heads = self.qkv_proj(x).unflatten(1, (-1, self.head_dim))  # [T, H + 2 KH, D]
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        q, k = apply_normed_rotary(q, k, self.q_norm, self.k_norm, rope)
        return self.o_proj(self.attn(q, k, v, batch), residual=residual)


class Qwen3ForCausalLM(CausalLM):
    config_class = Qwen3Config

    def __init__(self, config: Qwen3Config, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        layers = (
            LlamaDecoderLayer(
                Qwen3Attention(config, window, ctx),
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
