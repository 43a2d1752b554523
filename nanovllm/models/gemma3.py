"""Gemma 3, its language model (Gemma team 2025): local and global attention in turns, norms before
and after each block. Files of the models that also see images hold it with a prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanovllm.batch import Batch
from nanovllm.build_context import BuildContext
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import GemmaRMSNorm
from nanovllm.layers.linear import QKVParallelLinear, RowParallelLinear
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.rotary_embedding import Rope, RopeConfig, RotaryEmbedding, apply_normed_rotary
from nanovllm.models.base import CausalLM
from nanovllm.models.config_reader import layer_windows, read_config, refuse_unless
from nanovllm.weights.rules import LLAMA_RULES, Rename, Skip, head_rules


@dataclass(frozen=True)
class Gemma3Config:
    """Hugging Face's keys and defaults. windows: of each layer, None where it is global.

    rope, local_rope: of the global layers and of the others. query_pre_attn_scalar: the softmax
    scale to the power of -2.
    """

    rope: RopeConfig
    local_rope: RopeConfig
    windows: tuple[int | None, ...]
    vocab_size: int = 262208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    query_pre_attn_scalar: int = 256
    tie_word_embeddings: bool = True

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Gemma3Config:
        if "text_config" in config:
            config = {**config["text_config"], "tie_word_embeddings": config.get("tie_word_embeddings")}
        refuse_unless(
            config, final_logit_softcapping=None, attn_logit_softcapping=None, use_bidirectional_attention=False
        )
        layers = config.get("num_hidden_layers") or cls.num_hidden_layers
        pattern = config.get("sliding_window_pattern", 6)  # the last of so many layers is global
        kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
        return read_config(
            cls,
            config,
            rope=RopeConfig.from_hf(config, 1e6, layer_type="full_attention"),
            local_rope=RopeConfig.from_hf(config, layer_type="sliding_attention"),
            windows=layer_windows(config.get("layer_types") or kinds, layers, config.get("sliding_window", 4096)),
        )


class Gemma3Attention(nn.Module):
    def __init__(self, config: Gemma3Config, window: int | None, ctx: BuildContext) -> None:
        super().__init__()
        heads, kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        bias, scale = config.attention_bias, config.query_pre_attn_scalar**-0.5
        self.qkv_proj = QKVParallelLinear(config.hidden_size, heads, kv_heads, self.head_dim, ctx, bias=bias)
        self.num_heads, self.num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.o_proj = RowParallelLinear(heads * self.head_dim, config.hidden_size, ctx, bias=bias)
        self.q_norm = GemmaRMSNorm(self.head_dim, config.rms_norm_eps, ctx)
        self.k_norm = GemmaRMSNorm(self.head_dim, config.rms_norm_eps, ctx)
        self.attn = Attention(self.num_heads, self.num_kv_heads, self.head_dim, ctx, scale=scale, window=window)

    def forward(self, x: torch.Tensor, rope: Rope, batch: Batch) -> torch.Tensor:
        heads = self.qkv_proj(x).unflatten(1, (-1, self.head_dim))  # [T, H + 2 KH, D]
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        q, k = apply_normed_rotary(q, k, self.q_norm, self.k_norm, rope)
        return self.o_proj(self.attn(q, k, v, batch))


class Gemma3DecoderLayer(nn.Module):
    def __init__(self, config: Gemma3Config, window: int | None, ctx: BuildContext) -> None:
        super().__init__()
        self.is_local = window is not None
        self.self_attn = Gemma3Attention(config, window, ctx)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, ctx, act=config.hidden_activation)
        self.input_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps, ctx)
        self.post_attention_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps, ctx)
        self.pre_feedforward_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps, ctx)
        self.post_feedforward_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps, ctx)

    def forward(self, x: torch.Tensor, rope: Rope, batch: Batch) -> torch.Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope, batch))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma3Model(nn.Module):
    def __init__(self, config: Gemma3Config, ctx: BuildContext) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, ctx)
        self.layers = nn.ModuleList(Gemma3DecoderLayer(config, window, ctx) for window in config.windows)
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps, ctx)
        self.rotary_emb = RotaryEmbedding(config.head_dim, config.rope, ctx)
        self.rotary_emb_local = RotaryEmbedding(config.head_dim, config.local_rope, ctx)
        # the model was trained with this number rounded to its weights' dtype: 55.5 for sqrt(3072)
        self._embed_scale = torch.tensor(config.hidden_size**0.5).to(ctx.dtype).item()

    def forward(self, batch: Batch) -> torch.Tensor:
        x = self.embed_tokens(batch.input_ids) * self._embed_scale  # [T, hidden]
        rope, local_rope = self.rotary_emb(batch.positions), self.rotary_emb_local(batch.positions)
        for layer in self.layers:
            x = layer(x, local_rope if layer.is_local else rope, batch)
        return self.norm(x)


class Gemma3ForCausalLM(CausalLM):
    config_class = Gemma3Config

    def __init__(self, config: Gemma3Config, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        self.model = Gemma3Model(config, ctx)
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, ctx, tied=tied)
        self.weight_rules = [
            Skip("*vision_tower.*"),
            Skip("*multi_modal_projector.*"),
            Rename(r"^language_model\.", ""),
            Rename(r"^model\.language_model\.", "model."),
            *LLAMA_RULES,
            *head_rules(config.tie_word_embeddings),
        ]
