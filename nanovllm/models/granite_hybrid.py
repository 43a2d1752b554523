"""Granite 4.0 H (IBM 2025): Mamba2 layers with a few attention layers among them, dense or MoE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanovllm.batch import Batch
from nanovllm.build_context import BuildContext
from nanovllm.errors import ModelNotSupported
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import QKVParallelLinear, RowParallelLinear
from nanovllm.layers.mamba2 import Mamba2
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.moe import SparseMoE
from nanovllm.layers.rotary_embedding import Rope, RopeConfig, RotaryEmbedding, apply_rotary
from nanovllm.models.base import CausalLM
from nanovllm.models.config_reader import read_config, refuse_unless, rope_fields
from nanovllm.ops.mamba2 import Mamba2Sizes
from nanovllm.weights.rules import LLAMA_RULES, Pack, Rule, Split, fused_expert_rules, head_rules

# both generations of config.json
_LAYER_TYPES = {"mamba": "mamba", "linear_attention": "mamba", "attention": "attention", "full_attention": "attention"}


@dataclass(frozen=True)
class GraniteHybridConfig:
    """Hugging Face's keys and defaults; layer_types: "mamba" or "attention"."""

    layer_types: tuple[str, ...]
    num_key_value_heads: int
    head_dim: int
    rope: RopeConfig
    mamba_d_head: int
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008  # of one expert
    shared_intermediate_size: int = 1024  # of the MLP that all tokens go through
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    max_position_embeddings: int = 2048
    position_embedding_type: str | None = None
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    mamba_n_heads: int = 128
    mamba_n_groups: int = 1
    mamba_d_state: int = 256
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    tie_word_embeddings: bool = False

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> GraniteHybridConfig:
        refuse_unless(config, hidden_act="silu")
        heads = config.get("num_attention_heads") or cls.num_attention_heads
        hidden = config.get("hidden_size") or cls.hidden_size
        inner = hidden * (config.get("mamba_expand") or cls.mamba_expand)
        mamba_heads = config.get("mamba_n_heads") or cls.mamba_n_heads
        mamba_head_dim = config.get("mamba_d_head") or "auto"
        if mamba_head_dim == "auto":
            mamba_head_dim = inner // mamba_heads
        if mamba_head_dim * mamba_heads != inner:
            raise ModelNotSupported(
                f"config.json: {mamba_heads} Mamba heads of {mamba_head_dim} do not make up {inner}, "
                "which is hidden_size * mamba_expand"
            )
        groups = config.get("mamba_n_groups") or cls.mamba_n_groups
        if mamba_heads % groups:
            raise ModelNotSupported(f"config.json: {groups} groups do not divide {mamba_heads} Mamba heads")
        return read_config(
            cls,
            config,
            layer_types=_layer_types(config, config.get("num_hidden_layers") or cls.num_hidden_layers),
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            **rope_fields(config, cls.max_position_embeddings),
            mamba_d_head=mamba_head_dim,
            time_step_limit=_limits(config.get("time_step_limit") or cls.time_step_limit),
        )

    @property
    def mamba(self) -> Mamba2Sizes:
        return Mamba2Sizes(
            hidden_size=self.hidden_size,
            num_heads=self.mamba_n_heads,
            head_dim=self.mamba_d_head,
            num_groups=self.mamba_n_groups,
            state_size=self.mamba_d_state,
            conv_kernel=self.mamba_d_conv,
            rms_norm_eps=self.rms_norm_eps,
            conv_bias=self.mamba_conv_bias,
            proj_bias=self.mamba_proj_bias,
            time_step_limit=self.time_step_limit,
        )


class GraniteHybridAttention(nn.Module):
    def __init__(self, config: GraniteHybridConfig, ctx: BuildContext) -> None:
        super().__init__()
        heads, kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        bias = config.attention_bias
        self.qkv_proj = QKVParallelLinear(config.hidden_size, heads, kv_heads, self.head_dim, ctx, bias=bias)
        self.num_heads, self.num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.o_proj = RowParallelLinear(heads * self.head_dim, config.hidden_size, ctx, bias=bias)
        self.attn = Attention(self.num_heads, self.num_kv_heads, self.head_dim, ctx, scale=config.attention_multiplier)

    def forward(self, x: torch.Tensor, rope: Rope | None, batch: Batch) -> torch.Tensor:
        heads = self.qkv_proj(x).unflatten(1, (-1, self.head_dim))  # [T, H + 2 KH, D]
        qk, v = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=1)
        if rope is not None:
            qk = apply_rotary(qk, *rope)
        q, k = qk.split((self.num_heads, self.num_kv_heads), dim=1)
        return self.o_proj(self.attn(q, k, v, batch))


class GraniteHybridDecoderLayer(nn.Module):
    """Mamba2 or attention, then the shared MLP and, in a MoE model, a mixture of experts beside it."""

    def __init__(self, config: GraniteHybridConfig, ctx: BuildContext, layer_type: str) -> None:
        super().__init__()
        hidden = config.hidden_size
        if layer_type == "mamba":
            self.mamba = Mamba2(config.mamba, ctx)
        else:
            self.self_attn = GraniteHybridAttention(config, ctx)
        if config.num_local_experts:
            self.block_sparse_moe = SparseMoE(
                hidden,
                config.intermediate_size,
                config.num_local_experts,
                config.num_experts_per_tok,
                ctx,
                normalise=True,
                reduce=False,
            )
        self.shared_mlp = GatedMLP(hidden, config.shared_intermediate_size, ctx, reduce=False)
        self._tp = ctx.tp
        self.input_layernorm = RMSNorm(hidden, config.rms_norm_eps, ctx)
        self.post_attention_layernorm = RMSNorm(hidden, config.rms_norm_eps, ctx)
        self._is_mamba, self._is_sparse = layer_type == "mamba", config.num_local_experts > 0
        self._multiplier = config.residual_multiplier

    def forward(self, x: torch.Tensor, rope: Rope | None, plan: Any, batch: Batch) -> torch.Tensor:
        normed = self.input_layernorm(x)
        mixed = self.mamba(normed, plan) if self._is_mamba else self.self_attn(normed, rope, batch)
        x = x + mixed * self._multiplier
        normed = self.post_attention_layernorm(x)
        fed = self.shared_mlp(normed)
        if self._is_sparse:
            fed = self.block_sparse_moe(normed) + fed
        return x + self._tp.all_reduce(fed) * self._multiplier


class GraniteHybridModel(nn.Module):
    def __init__(self, config: GraniteHybridConfig, ctx: BuildContext) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, ctx)
        self.layers = nn.ModuleList(GraniteHybridDecoderLayer(config, ctx, kind) for kind in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ctx)
        self.rotary_emb = None
        if config.position_embedding_type == "rope":  # else the Mamba2 layers alone tell the order
            self.rotary_emb = RotaryEmbedding(config.head_dim, config.rope, ctx)
        self._multiplier = config.embedding_multiplier
        self._ops, self._sizes = ctx.ops, config.mamba

    def forward(self, batch: Batch) -> torch.Tensor:
        x = self.embed_tokens(batch.input_ids) * self._multiplier  # [T, hidden]
        rope = self.rotary_emb(batch.positions) if self.rotary_emb is not None else None
        plan = self._ops.plan_mamba2(batch, self._sizes)
        for layer in self.layers:
            x = layer(x, rope, plan, batch)
        return self.norm(x)


class GraniteMoeHybridForCausalLM(CausalLM):
    config_class = GraniteHybridConfig

    def __init__(self, config: GraniteHybridConfig, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        self.model = GraniteHybridModel(config, ctx)
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, ctx, tied=tied)
        self._logits_scaling = config.logits_scaling
        self.weight_rules = [*_weight_rules(config), *LLAMA_RULES, *head_rules(config.tie_word_embeddings)]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().compute_logits(hidden) / self._logits_scaling


def _weight_rules(config: GraniteHybridConfig) -> list[Rule]:
    shards = config.mamba.in_proj_shards
    in_proj = tuple(("mamba.in_proj", name) for name in shards)
    halves = (("shared_mlp.gate_up_proj", "gate"), ("shared_mlp.gate_up_proj", "up"))
    return [
        Split("mamba.in_proj", in_proj, lambda fused: fused.split(list(shards.values()))),
        Split("shared_mlp.input_linear", halves, lambda fused: fused.chunk(2)),
        Pack("shared_mlp.output_linear", "shared_mlp.down_proj", None),
        *fused_expert_rules("block_sparse_moe", config.num_local_experts),
    ]


def _layer_types(config: dict[str, Any], count: int) -> tuple[str, ...]:
    found = config.get("layer_types") or config.get("layers_block_type") or ["mamba"] * count
    if len(found) != count or not set(found) <= set(_LAYER_TYPES):
        raise ModelNotSupported(
            f"config.json: layer_types={found!r} should name for each of the {count} layers one of "
            f"{', '.join(_LAYER_TYPES)}"
        )
    return tuple(_LAYER_TYPES[name] for name in found)


def _limits(found: Any) -> tuple[float, float]:
    """Infinity is a number or, as transformers 5 writes it, {"__float__": "Infinity"}."""
    low, high = (float(v["__float__"]) if isinstance(v, dict) else float(v) for v in found)
    return low, high
