"""Granite 3 with a mixture of experts, alone or beside a shared MLP (IBM Granite team 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from nanovllm.batch import Batch
from nanovllm.build_context import BuildContext
from nanovllm.layers.embed_head import ParallelLMHead
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.moe import SparseMoE
from nanovllm.models.base import CausalLM
from nanovllm.models.granite import GraniteConfig, GraniteModel, granite_attention
from nanovllm.weights.rules import LLAMA_RULES, Pack, Split, fused_expert_rules, head_rules


@dataclass(frozen=True)
class GraniteMoeConfig(GraniteConfig):
    """Hugging Face's keys and defaults: Granite's and these. shared_intermediate_size 0: no shared MLP."""

    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    shared_intermediate_size: int = 0


class GraniteMoeDecoderLayer(nn.Module):
    def __init__(self, config: GraniteMoeConfig, ctx: BuildContext) -> None:
        super().__init__()
        self.self_attn = granite_attention(config, ctx)
        self.block_sparse_moe = SparseMoE(
            config.hidden_size,
            config.intermediate_size,
            config.num_local_experts,
            config.num_experts_per_tok,
            ctx,
            normalise=True,
            reduce=False,
        )
        shared = config.shared_intermediate_size
        self.shared_mlp = GatedMLP(config.hidden_size, shared, ctx, reduce=False) if shared else None
        self._tp = ctx.tp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ctx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ctx)
        self._multiplier = config.residual_multiplier

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], batch: Batch) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, batch) * self._multiplier
        normed = self.post_attention_layernorm(x)
        out = self.block_sparse_moe(normed)
        if self.shared_mlp is not None:
            out = out + self.shared_mlp(normed)
        return x + self._tp.all_reduce(out) * self._multiplier


class GraniteMoeForCausalLM(CausalLM):
    config_class = GraniteMoeConfig

    def __init__(self, config: GraniteMoeConfig, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        layers = (GraniteMoeDecoderLayer(config, ctx) for _ in range(config.num_hidden_layers))
        self.model = GraniteModel(layers, config, ctx)
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, ctx, tied=tied)
        halves = (("shared_mlp.gate_up_proj", "gate"), ("shared_mlp.gate_up_proj", "up"))
        self.weight_rules = [
            *fused_expert_rules("block_sparse_moe", config.num_local_experts),
            Split("shared_mlp.input_linear", halves, lambda fused: fused.chunk(2)),
            Pack("shared_mlp.output_linear", "shared_mlp.down_proj", None),
            *LLAMA_RULES,
            *head_rules(config.tie_word_embeddings),
        ]
        self._logits_scaling = config.logits_scaling

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().compute_logits(hidden) / self._logits_scaling
