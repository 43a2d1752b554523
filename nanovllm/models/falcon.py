"""Falcon (Almazrouei et al. 2023) in its three forms.

- rw-1b: a block does attention, then the MLP; ALiBi, biases, a key/value head for each query head.
- 7B: attention and MLP are parallel behind one norm; RoPE, one key/value head for all.
- 40B, 180B and Falcon2 11B, the "new decoder": parallel, and grouped key/value heads. 40B and 180B
  have a norm for each of the two, 11B one for both.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanovllm.attention.alibi import Alibi, alibi_slopes
from nanovllm.batch import Batch
from nanovllm.build_context import BuildContext
from nanovllm.distributed.group import TPGroup
from nanovllm.errors import ModelNotSupported
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import LayerNorm
from nanovllm.layers.linear import ActivatedLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.rotary_embedding import Rope, RopeConfig, RotaryEmbedding, apply_rotary
from nanovllm.models.base import CausalLM
from nanovllm.models.config_reader import read_config, refuse_unless, rope_fields
from nanovllm.weights.rules import Skip, grouped_qkv_rule, head_rules

# as the files of model type RefinedWebModel (7B, rw-1b) and RefinedWeb (40B) call them
_OLD_KEYS = {
    "n_embed": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
}


@dataclass(frozen=True)
class FalconConfig:
    """Hugging Face's keys and defaults, but for these three.

    num_kv_heads: those that there are; the files name it even where it does not count.
    num_ln_in_parallel_attn: 2 if attention and MLP have a norm each.
    rope: None with ALiBi.
    """

    num_kv_heads: int
    num_ln_in_parallel_attn: int
    ffn_hidden_size: int
    rope: RopeConfig | None
    vocab_size: int = 65024
    hidden_size: int = 4544
    num_hidden_layers: int = 32
    num_attention_heads: int = 71
    layer_norm_epsilon: float = 1e-5
    parallel_attn: bool = True
    bias: bool = False
    max_position_embeddings: int = 2048
    activation: str = "gelu"
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> FalconConfig:
        refuse_unless(config, apply_residual_connection_post_layernorm=False)
        # RefinedWeb does not say that it is the new decoder, but it alone has n_head_kv
        new_decoder = config.get("new_decoder_architecture", config.get("n_head_kv") is not None)
        config = config | {new: config[old] for old, new in _OLD_KEYS.items() if config.get(old) is not None}
        heads = config.get("num_attention_heads") or cls.num_attention_heads
        if new_decoder:
            kv_heads = config.get("num_kv_heads") or heads
        else:
            kv_heads = 1 if config.get("multi_query", True) else heads
        norms = config.get("num_ln_in_parallel_attn") or (2 if new_decoder else 1)
        if norms not in ((1, 2) if new_decoder else (1,)):
            raise ModelNotSupported(f"config.json: num_ln_in_parallel_attn={norms} is not supported in this decoder")
        return read_config(
            cls,
            config,
            num_kv_heads=kv_heads,
            num_ln_in_parallel_attn=norms,
            parallel_attn=new_decoder or config.get("parallel_attn", True),
            ffn_hidden_size=config.get("ffn_hidden_size") or 4 * (config.get("hidden_size") or cls.hidden_size),
            **({"rope": None} if config.get("alibi") else rope_fields(config, cls.max_position_embeddings)),
        )


class FalconAttention(nn.Module):
    def __init__(self, config: FalconConfig, alibi: Alibi | None, ctx: BuildContext) -> None:
        super().__init__()
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        group = attention_group(config, ctx.tp)
        alone = dataclasses.replace(ctx, tp=group)
        self.query_key_value = QKVParallelLinear(width, heads, kv_heads, self.head_dim, alone, bias=config.bias)
        self.dense = RowParallelLinear(width, width, ctx, bias=config.bias, reduce=not config.parallel_attn)
        self.num_heads, self.num_kv_heads = self.query_key_value.num_heads, self.query_key_value.num_kv_heads
        # a rank that has computed all heads projects only its part of them
        self.mine = slice(None) if group.size == ctx.tp.size else ctx.tp.part(width, "attention's results")
        self.attn = Attention(
            self.num_heads, self.num_kv_heads, self.head_dim, ctx, scale=self.head_dim**-0.5, alibi=alibi
        )

    def forward(
        self, x: torch.Tensor, rope: Rope | None, batch: Batch, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        heads = self.query_key_value(x).unflatten(1, (-1, self.head_dim))  # [T, H + 2 KH, D]
        qk, v = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=1)
        if rope is not None:
            qk = apply_rotary(qk, *rope)
        q, k = qk.split((self.num_heads, self.num_kv_heads), dim=1)
        return self.dense(self.attn(q, k, v, batch)[:, self.mine], residual=residual)


def attention_group(config: FalconConfig, tp: TPGroup) -> TPGroup:
    """The ranks that share the heads. 7B has 71 of them, which no number of ranks divides: then each rank computes
    all, with all of the one key/value head, and its part of every other matrix."""
    is_whole = config.num_kv_heads == 1 and config.num_attention_heads % tp.size != 0
    return TPGroup() if is_whole else tp


class FalconMLP(nn.Module):
    def __init__(self, config: FalconConfig, ctx: BuildContext) -> None:
        super().__init__()
        self.dense_h_to_4h = ActivatedLinear(
            config.hidden_size, config.ffn_hidden_size, ctx, bias=config.bias, act=config.activation
        )
        self.dense_4h_to_h = RowParallelLinear(
            config.ffn_hidden_size, config.hidden_size, ctx, bias=config.bias, reduce=not config.parallel_attn
        )

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(self.dense_h_to_4h(x), residual=residual)


class FalconDecoderLayer(nn.Module):
    """What the forms share; they differ in their norms and in what the MLP sees."""

    def __init__(self, config: FalconConfig, alibi: Alibi | None, ctx: BuildContext) -> None:
        super().__init__()
        self.self_attention = FalconAttention(config, alibi, ctx)
        self.mlp = FalconMLP(config, ctx)
        self._tp = ctx.tp


class SequentialLayer(FalconDecoderLayer):
    """rw-1b: attention, then the MLP."""

    def __init__(self, config: FalconConfig, alibi: Alibi | None, ctx: BuildContext) -> None:
        super().__init__(config, alibi, ctx)
        self.input_layernorm = LayerNorm(config.hidden_size, config.layer_norm_epsilon, ctx)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.layer_norm_epsilon, ctx)

    def forward(self, x: torch.Tensor, rope: Rope | None, batch: Batch) -> torch.Tensor:
        x = self.self_attention(self.input_layernorm(x), rope, batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class OneNormLayer(FalconDecoderLayer):
    """7B and 11B: attention and MLP read the same normed input."""

    def __init__(self, config: FalconConfig, alibi: Alibi | None, ctx: BuildContext) -> None:
        super().__init__(config, alibi, ctx)
        self.input_layernorm = LayerNorm(config.hidden_size, config.layer_norm_epsilon, ctx)

    def forward(self, x: torch.Tensor, rope: Rope | None, batch: Batch) -> torch.Tensor:
        normed = self.input_layernorm(x)
        return x + self._tp.all_reduce(self.mlp(normed, residual=self.self_attention(normed, rope, batch)))


class TwoNormLayer(FalconDecoderLayer):
    """40B and 180B: attention and MLP norm the same input each for itself."""

    def __init__(self, config: FalconConfig, alibi: Alibi | None, ctx: BuildContext) -> None:
        super().__init__(config, alibi, ctx)
        self.ln_attn = LayerNorm(config.hidden_size, config.layer_norm_epsilon, ctx)
        self.ln_mlp = LayerNorm(config.hidden_size, config.layer_norm_epsilon, ctx)

    def forward(self, x: torch.Tensor, rope: Rope | None, batch: Batch) -> torch.Tensor:
        attended = self.self_attention(self.ln_attn(x), rope, batch)
        return x + self._tp.all_reduce(self.mlp(self.ln_mlp(x), residual=attended))


def layer_class(config: FalconConfig) -> type[FalconDecoderLayer]:
    if not config.parallel_attn:
        return SequentialLayer
    return TwoNormLayer if config.num_ln_in_parallel_attn == 2 else OneNormLayer


class FalconModel(nn.Module):
    def __init__(self, config: FalconConfig, ctx: BuildContext) -> None:
        super().__init__()
        self.rotary_emb = RotaryEmbedding(config.head_dim, config.rope, ctx) if config.rope else None
        alibi = None if config.rope else _alibi(config, ctx)
        layer = layer_class(config)
        self.word_embeddings = VocabParallelEmbedding(config.vocab_size, config.hidden_size, ctx)
        self.h = nn.ModuleList(layer(config, alibi, ctx) for _ in range(config.num_hidden_layers))
        self.ln_f = LayerNorm(config.hidden_size, config.layer_norm_epsilon, ctx)

    def forward(self, batch: Batch) -> torch.Tensor:
        x = self.word_embeddings(batch.input_ids)  # [T, hidden]
        rope = self.rotary_emb(batch.positions) if self.rotary_emb is not None else None
        for layer in self.h:
            x = layer(x, rope, batch)
        return self.ln_f(x)


def _alibi(config: FalconConfig, ctx: BuildContext) -> Alibi:
    """Added to the scores before they are scaled, and so scaled like them."""
    heads = attention_group(config, ctx.tp).part(config.num_attention_heads, "query heads")
    slopes = alibi_slopes(config.num_attention_heads)[heads]
    return Alibi(slopes.to(ctx.device), rounded=True, factor=config.head_dim**-0.5)


class FalconForCausalLM(CausalLM):
    config_class = FalconConfig

    def __init__(self, config: FalconConfig, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        self.transformer = FalconModel(config, ctx)
        tied = self.transformer.word_embeddings if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, ctx, tied=tied)
        self.weight_rules = [
            Skip("*.inv_freq"),
            grouped_qkv_rule("query_key_value", config.num_kv_heads, config.head_dim),
            *head_rules(config.tie_word_embeddings),
        ]

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.transformer(batch)
