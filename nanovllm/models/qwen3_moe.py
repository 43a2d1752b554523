"""Qwen3-MoE (Qwen team 2025): Qwen3 with a mixture of experts in the place of most MLPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from nanovllm.build_context import BuildContext
from nanovllm.layers.embed_head import ParallelLMHead
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.moe import SparseMoE
from nanovllm.models.base import CausalLM
from nanovllm.models.config_reader import layer_windows, read_config, refuse_unless, rope_fields
from nanovllm.models.llama import LlamaDecoderLayer, LlamaModel
from nanovllm.models.qwen3 import Qwen3Attention, Qwen3Config
from nanovllm.weights.rules import LLAMA_RULES, head_rules


@dataclass(frozen=True)
class Qwen3MoeConfig(Qwen3Config):
    """Hugging Face's keys and defaults: Qwen3's but for these.

    decoder_sparse_step: every so many layers have experts, but for `mlp_only_layers`.
    intermediate_size: of the other layers. num_experts: also called num_local_experts on disk.
    """

    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    decoder_sparse_step: int = 1
    moe_intermediate_size: int = 768
    num_experts_per_tok: int = 8
    num_experts: int = 128
    norm_topk_prob: bool = False
    mlp_only_layers: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Qwen3MoeConfig:
        refuse_unless(config, hidden_act="silu")
        heads = config.get("num_attention_heads") or cls.num_attention_heads
        hidden = config.get("hidden_size") or cls.hidden_size
        layers = config.get("num_hidden_layers") or cls.num_hidden_layers
        window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
        kinds = ["full_attention" if window is None else "sliding_attention"] * layers  # unlike Qwen3's
        return read_config(
            cls,
            config,
            num_key_value_heads=config.get("num_key_value_heads", 4) or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            **rope_fields(config, cls.max_position_embeddings),
            windows=layer_windows(kinds, layers, window),
            num_experts=config.get("num_experts", config.get("num_local_experts", cls.num_experts)),
            mlp_only_layers=tuple(config.get("mlp_only_layers") or ()),
        )

    def has_experts(self, layer: int) -> bool:
        step = self.decoder_sparse_step
        return self.num_experts > 0 and layer not in self.mlp_only_layers and (layer + 1) % step == 0


def qwen3_moe_mlp(config: Qwen3MoeConfig, layer: int, ctx: BuildContext) -> nn.Module:
    if not config.has_experts(layer):
        return GatedMLP(config.hidden_size, config.intermediate_size, ctx)
    return SparseMoE(
        config.hidden_size,
        config.moe_intermediate_size,
        config.num_experts,
        config.num_experts_per_tok,
        ctx,
        normalise=config.norm_topk_prob,
    )


class Qwen3MoeForCausalLM(CausalLM):
    config_class = Qwen3MoeConfig

    def __init__(self, config: Qwen3MoeConfig, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        layers = (
            LlamaDecoderLayer(Qwen3Attention(config, window, ctx), qwen3_moe_mlp(config, i, ctx), config, ctx)
            for i, window in enumerate(config.windows)
        )
        self.model = LlamaModel(layers, config, ctx)
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, ctx, tied=tied)
        self.weight_rules = [*LLAMA_RULES, *head_rules(config.tie_word_embeddings)]
