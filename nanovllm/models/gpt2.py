"""GPT-2 of all sizes (Radford et al. 2019): learned positions and a norm before each half of a block."""

from __future__ import annotations

from collections.abc import Sequence
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
from nanovllm.layers.weight_layer import WeightLayer
from nanovllm.models.base import CausalLM
from nanovllm.models.config_reader import read_config, refuse_unless
from nanovllm.weights.rules import Rename, Skip, Split, Transpose, head_rules


@dataclass(frozen=True)
class GPT2Config:
    """Hugging Face's keys and defaults."""

    n_inner: int
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    # not reorder_and_upcast_attn: softmax is in fp32 here anyway

    @property
    def max_position_embeddings(self) -> int:
        return self.n_positions

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> GPT2Config:
        refuse_unless(config, add_cross_attention=False)
        width = config.get("n_embd") or cls.n_embd
        return read_config(cls, config, n_inner=config.get("n_inner") or 4 * width)


class LearnedPositions(WeightLayer):
    """A vector for each position; positions [T] to [T, H]."""

    weight: torch.Tensor

    def __init__(self, num_positions: int, hidden_size: int, ctx: BuildContext) -> None:
        super().__init__()
        self._ops = ctx.ops
        self.add_parameter("weight", (num_positions, hidden_size), ctx.dtype, ctx.device)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return self._ops.gather(self.weight, positions)


class GPT2Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int, ctx: BuildContext) -> None:
        super().__init__()
        width, heads = config.n_embd, config.n_head
        self.head_dim = width // heads
        scale = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        self.c_attn = QKVParallelLinear(width, heads, heads, self.head_dim, ctx, bias=True)
        self.c_proj = RowParallelLinear(width, width, ctx, bias=True)
        mine = self.c_attn.num_heads
        self.attn = Attention(mine, mine, self.head_dim, ctx, scale=scale)

    def forward(self, x: torch.Tensor, batch: Batch, residual: torch.Tensor) -> torch.Tensor:
        q, k, v = self.c_attn(x).unflatten(1, (3, -1, self.head_dim)).unbind(1)  # [T, H, D] each
        return self.c_proj(self.attn(q, k, v, batch), residual=residual)


class GPT2MLP(nn.Module):
    def __init__(self, config: GPT2Config, ctx: BuildContext) -> None:
        super().__init__()
        self.c_fc = ActivatedLinear(config.n_embd, config.n_inner, ctx, bias=True, act=config.activation_function)
        self.c_proj = RowParallelLinear(config.n_inner, config.n_embd, ctx, bias=True)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.c_fc(x), residual=residual)


class GPT2Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int, ctx: BuildContext) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon, ctx)
        self.attn = GPT2Attention(config, layer, ctx)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon, ctx)
        self.mlp = GPT2MLP(config, ctx)

    def forward(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        x = self.attn(self.ln_1(x), batch, residual=x)
        return self.mlp(self.ln_2(x), residual=x)


class GPT2Model(nn.Module):
    def __init__(self, config: GPT2Config, ctx: BuildContext) -> None:
        super().__init__()
        self.wte = VocabParallelEmbedding(config.vocab_size, config.n_embd, ctx)
        self.wpe = LearnedPositions(config.n_positions, config.n_embd, ctx)
        self.h = nn.ModuleList(GPT2Block(config, layer, ctx) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon, ctx)

    def forward(self, batch: Batch) -> torch.Tensor:
        x = self.wte(batch.input_ids) + self.wpe(batch.positions)  # [T, n_embd]
        for block in self.h:
            x = block(x, batch)
        return self.ln_f(x)


class GPT2LMHeadModel(CausalLM):
    config_class = GPT2Config

    def __init__(self, config: GPT2Config, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        self.transformer = GPT2Model(config, ctx)
        tied = self.transformer.wte if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, config.n_embd, ctx, tied=tied)
        self.weight_rules = [
            Rename(r"^(?!transformer\.|lm_head\.)", "transformer."),  # the first files have no prefix
            Skip("*.attn.bias"),  # the causal mask, which used to be a buffer
            Skip("*.attn.masked_bias"),
            Split("c_attn", (("c_attn", "q"), ("c_attn", "k"), ("c_attn", "v")), _thirds),
            Transpose("c_proj"),
            Transpose("c_fc"),
            *head_rules(config.tie_word_embeddings),
        ]

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.transformer(batch)


def _thirds(fused: torch.Tensor) -> Sequence[torch.Tensor]:
    """Query, key and value of one projection, [in, out] on disk."""
    return fused.t().chunk(3)
