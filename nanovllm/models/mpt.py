"""MPT (MosaicML 2023): ALiBi for positions, and no biases anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanovllm.attention.alibi import Alibi, alibi_slopes
from nanovllm.batch import Batch
from nanovllm.build_context import BuildContext
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import LayerNorm
from nanovllm.layers.linear import ActivatedLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.models.base import CausalLM
from nanovllm.models.config_reader import read_config, refuse_unless
from nanovllm.weights.rules import Split, head_rules


@dataclass(frozen=True)
class MptAttentionConfig:
    """Hugging Face's keys and defaults."""

    clip_qkv: float | None = None
    softmax_scale: float | None = None  # null: 1 / sqrt(head size)
    alibi_bias_max: float = 8

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> MptAttentionConfig:
        refuse_unless(config, attn_type="multihead_attention", qk_ln=False, prefix_lm=False, alibi=True)
        return read_config(cls, config)


@dataclass(frozen=True)
class MptConfig:
    """Hugging Face's keys and defaults.

    As in MosaicML's own code, and other than in transformers, alibi_bias_max counts (StoryWriter has
    16, transformers takes 8) and so does expansion_ratio (transformers takes 4). learned_pos_emb is
    for models without ALiBi.
    """

    attn_config: MptAttentionConfig
    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    expansion_ratio: int = 4
    max_seq_len: int = 2048
    vocab_size: int = 50368
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True

    @property
    def max_position_embeddings(self) -> int:
        return self.max_seq_len

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> MptConfig:
        refuse_unless(config, no_bias=True, norm_type="low_precision_layernorm", logit_scale=None)
        return read_config(cls, config, attn_config=MptAttentionConfig.from_hf(config.get("attn_config") or {}))


class MptAttention(nn.Module):
    def __init__(self, config: MptConfig, alibi: Alibi, ctx: BuildContext) -> None:
        super().__init__()
        width, heads = config.d_model, config.n_heads
        self.head_dim = width // heads
        self.clip = config.attn_config.clip_qkv
        self.Wqkv = QKVParallelLinear(width, heads, heads, self.head_dim, ctx)
        self.out_proj = RowParallelLinear(width, width, ctx)
        mine = self.Wqkv.num_heads
        scale = config.attn_config.softmax_scale or self.head_dim**-0.5
        self.attn = Attention(mine, mine, self.head_dim, ctx, scale=scale, alibi=alibi)

    def forward(self, x: torch.Tensor, batch: Batch, residual: torch.Tensor) -> torch.Tensor:
        qkv = self.Wqkv(x)
        if self.clip:
            qkv = qkv.clamp(-self.clip, self.clip)
        q, k, v = qkv.unflatten(1, (3, -1, self.head_dim)).unbind(1)  # [T, H, D] each
        return self.out_proj(self.attn(q, k, v, batch), residual=residual)


class MptMLP(nn.Module):
    def __init__(self, config: MptConfig, ctx: BuildContext) -> None:
        super().__init__()
        inner = config.expansion_ratio * config.d_model
        self.up_proj = ActivatedLinear(config.d_model, inner, ctx, bias=False, act="gelu")
        self.down_proj = RowParallelLinear(inner, config.d_model, ctx)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj(x), residual=residual)


class MptBlock(nn.Module):
    def __init__(self, config: MptConfig, alibi: Alibi, ctx: BuildContext) -> None:
        super().__init__()
        self.norm_1 = LayerNorm(config.d_model, config.layer_norm_epsilon, ctx, bias=False)
        self.attn = MptAttention(config, alibi, ctx)
        self.norm_2 = LayerNorm(config.d_model, config.layer_norm_epsilon, ctx, bias=False)
        self.ffn = MptMLP(config, ctx)

    def forward(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        x = self.attn(self.norm_1(x), batch, residual=x)
        return self.ffn(self.norm_2(x), residual=x)


class MptModel(nn.Module):
    def __init__(self, config: MptConfig, ctx: BuildContext) -> None:
        super().__init__()
        slopes = alibi_slopes(config.n_heads, config.attn_config.alibi_bias_max)
        alibi = Alibi(slopes[ctx.tp.part(config.n_heads, "query heads")].to(ctx.device))
        self.wte = VocabParallelEmbedding(config.vocab_size, config.d_model, ctx)
        self.blocks = nn.ModuleList(MptBlock(config, alibi, ctx) for _ in range(config.n_layers))
        self.norm_f = LayerNorm(config.d_model, config.layer_norm_epsilon, ctx, bias=False)

    def forward(self, batch: Batch) -> torch.Tensor:
        x = self.wte(batch.input_ids)  # [T, d_model]
        for block in self.blocks:
            x = block(x, batch)
        return self.norm_f(x)


class MptForCausalLM(CausalLM):
    config_class = MptConfig

    def __init__(self, config: MptConfig, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        self.transformer = MptModel(config, ctx)
        tied = self.transformer.wte if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, config.d_model, ctx, tied=tied)
        self.weight_rules = [
            Split("Wqkv", (("Wqkv", "q"), ("Wqkv", "k"), ("Wqkv", "v")), _thirds),
            *head_rules(config.tie_word_embeddings),
        ]

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.transformer(batch)


def _thirds(fused: torch.Tensor) -> Sequence[torch.Tensor]:
    return fused.chunk(3)
