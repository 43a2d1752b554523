"""Llama 2 and 3, SmolLM, TinyLlama, CodeLlama (Touvron et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from nanovllm.batch import Batch
from nanovllm.build_context import BuildContext
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import QKVParallelLinear, RowParallelLinear
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.rotary_embedding import Rope, RopeConfig, RotaryEmbedding, apply_rotary
from nanovllm.models.base import CausalLM
from nanovllm.models.config_reader import read_config, refuse_unless, rope_fields
from nanovllm.weights.rules import LLAMA_RULES, head_rules


@dataclass(frozen=True)
class LlamaConfig:
    """Hugging Face's keys and defaults."""

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

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> LlamaConfig:
        refuse_unless(config, hidden_act="silu", pretraining_tp=1)
        heads = config.get("num_attention_heads") or cls.num_attention_heads
        hidden = config.get("hidden_size") or cls.hidden_size
        return read_config(
            cls,
            config,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            **rope_fields(config, cls.max_position_embeddings),
        )


class DecoderConfig(Protocol):
    """What the classes below read: other families are put together from them too."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def num_key_value_heads(self) -> int: ...

    @property
    def rms_norm_eps(self) -> float: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def rope(self) -> RopeConfig: ...


class LlamaAttention(nn.Module):
    """scale: of the scores, head_dim^-0.5 by default. window: tokens that a query sees."""

    def __init__(
        self,
        config: DecoderConfig,
        ctx: BuildContext,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        scale: float | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        heads, kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.qkv_proj = QKVParallelLinear(config.hidden_size, heads, kv_heads, self.head_dim, ctx, bias=qkv_bias)
        self.num_heads, self.num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.o_proj = RowParallelLinear(heads * self.head_dim, config.hidden_size, ctx, bias=o_bias)
        scale = self.head_dim**-0.5 if scale is None else scale
        self.attn = Attention(self.num_heads, self.num_kv_heads, self.head_dim, ctx, scale=scale, window=window)

    def forward(self, x: torch.Tensor, rope: Rope, batch: Batch, residual: torch.Tensor | None = None) -> torch.Tensor:
        heads = self.qkv_proj(x).unflatten(1, (-1, self.head_dim))  # [T, H + 2 KH, D]
        qk, v = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=1)
        q, k = apply_rotary(qk, *rope).split((self.num_heads, self.num_kv_heads), dim=1)
        return self.o_proj(self.attn(q, k, v, batch), residual=residual)


class LlamaDecoderLayer(nn.Module):
    """Attention, then the MLP, each behind a norm and added to what comes past it."""

    def __init__(self, self_attn: nn.Module, mlp: nn.Module, config: DecoderConfig, ctx: BuildContext) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ctx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ctx)

    def forward(self, x: torch.Tensor, rope: Rope, batch: Batch) -> torch.Tensor:
        x = self.self_attn(self.input_layernorm(x), rope, batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class LlamaModel(nn.Module):
    def __init__(self, layers: Iterable[nn.Module], config: DecoderConfig, ctx: BuildContext) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, ctx)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ctx)
        self.rotary_emb = RotaryEmbedding(config.head_dim, config.rope, ctx)

    def forward(self, batch: Batch) -> torch.Tensor:
        x = self.embed_tokens(batch.input_ids)  # [T, hidden]
        rope = self.rotary_emb(batch.positions)
        for layer in self.layers:
            x = layer(x, rope, batch)
        return self.norm(x)


class LlamaForCausalLM(CausalLM):
    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        bias = config.attention_bias
        layers = (
            LlamaDecoderLayer(
                LlamaAttention(config, ctx, qkv_bias=bias, o_bias=bias),
                GatedMLP(config.hidden_size, config.intermediate_size, ctx, bias=config.mlp_bias),
                config,
                ctx,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.model = LlamaModel(layers, config, ctx)
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, ctx, tied=tied)
        self.weight_rules = [*LLAMA_RULES, *head_rules(config.tie_word_embeddings)]
