"""GPT-NeoX and Pythia (Black et al. 2022, Biderman et al. 2023): part of each head is rotated, and
attention and MLP see the same input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanovllm.batch import Batch
from nanovllm.build_context import BuildContext
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import LayerNorm
from nanovllm.layers.linear import ActivatedLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.rotary_embedding import Rope, RopeConfig, RotaryEmbedding, apply_rotary
from nanovllm.models.base import CausalLM
from nanovllm.models.config_reader import read_config, rope_fields
from nanovllm.weights.rules import Pack, Skip, grouped_qkv_rule


@dataclass(frozen=True)
class GPTNeoXConfig:
    """Hugging Face's keys and defaults."""

    rope: RopeConfig
    vocab_size: int = 50432
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    hidden_act: str = "gelu"
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True
    tie_word_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> GPTNeoXConfig:
        return read_config(cls, config, **rope_fields({"rotary_pct": 0.25, **config}, cls.max_position_embeddings))


class GPTNeoXAttention(nn.Module):
    def __init__(self, config: GPTNeoXConfig, ctx: BuildContext) -> None:
        super().__init__()
        width, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.head_dim = config.head_dim
        self.query_key_value = QKVParallelLinear(width, heads, heads, self.head_dim, ctx, bias=bias)
        self.dense = RowParallelLinear(width, width, ctx, bias=bias, reduce=not config.use_parallel_residual)
        self.num_heads = self.query_key_value.num_heads
        self.attn = Attention(self.num_heads, self.num_heads, self.head_dim, ctx, scale=self.head_dim**-0.5)

    def forward(self, x: torch.Tensor, rope: Rope, batch: Batch, residual: torch.Tensor | None = None) -> torch.Tensor:
        heads = self.query_key_value(x).unflatten(1, (-1, self.head_dim))  # [T, 3 H, D]
        qk, v = heads.split((2 * self.num_heads, self.num_heads), dim=1)
        q, k = apply_rotary(qk, *rope).chunk(2, dim=1)
        return self.dense(self.attn(q, k, v, batch), residual=residual)


class GPTNeoXMLP(nn.Module):
    def __init__(self, config: GPTNeoXConfig, ctx: BuildContext) -> None:
        super().__init__()
        self.dense_h_to_4h = ActivatedLinear(
            config.hidden_size, config.intermediate_size, ctx, bias=True, act=config.hidden_act
        )
        self.dense_4h_to_h = RowParallelLinear(
            config.intermediate_size, config.hidden_size, ctx, bias=True, reduce=not config.use_parallel_residual
        )

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(self.dense_h_to_4h(x), residual=residual)


class GPTNeoXLayer(nn.Module):
    def __init__(self, config: GPTNeoXConfig, ctx: BuildContext) -> None:
        super().__init__()
        self.parallel, self._tp = config.use_parallel_residual, ctx.tp
        self.input_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, ctx)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, ctx)
        self.attention = GPTNeoXAttention(config, ctx)
        self.mlp = GPTNeoXMLP(config, ctx)

    def forward(self, x: torch.Tensor, rope: Rope, batch: Batch) -> torch.Tensor:
        normed = self.input_layernorm(x)
        if self.parallel:
            attended = self.attention(normed, rope, batch)
            return x + self._tp.all_reduce(self.mlp(self.post_attention_layernorm(x), residual=attended))
        x = self.attention(normed, rope, batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class GPTNeoXModel(nn.Module):
    def __init__(self, config: GPTNeoXConfig, ctx: BuildContext) -> None:
        super().__init__()
        self.embed_in = VocabParallelEmbedding(config.vocab_size, config.hidden_size, ctx)
        self.layers = nn.ModuleList(GPTNeoXLayer(config, ctx) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, ctx)
        self.rotary_emb = RotaryEmbedding(config.rope.rotary_dim(config.head_dim), config.rope, ctx)

    def forward(self, batch: Batch) -> torch.Tensor:
        x = self.embed_in(batch.input_ids)  # [T, hidden]
        rope = self.rotary_emb(batch.positions)
        for layer in self.layers:
            x = layer(x, rope, batch)
        return self.final_layer_norm(x)


class GPTNeoXForCausalLM(CausalLM):
    config_class = GPTNeoXConfig

    def __init__(self, config: GPTNeoXConfig, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        self.gpt_neox = GPTNeoXModel(config, ctx)
        tied = self.gpt_neox.embed_in if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, ctx, tied=tied)
        # on disk the head has another name than in transformers' modules
        skipped_head = (Skip("embed_out.weight"), Skip("lm_head.weight"))
        self.weight_rules = [
            *(skipped_head if config.tie_word_embeddings else (Pack("embed_out", "lm_head", None),)),
            Skip("*.attention.bias"),  # the causal mask, which used to be a buffer
            Skip("*.attention.masked_bias"),
            Skip("*.rotary_emb.inv_freq"),
            grouped_qkv_rule("query_key_value", config.num_attention_heads, config.head_dim),
        ]

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.gpt_neox(batch)
