"""Attention: the layer between a model's projections and the attention backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nanovllm.attention.alibi import Alibi
from nanovllm.attention.base import AttentionBackend
from nanovllm.batch import Batch
from nanovllm.build_context import BuildContext
from nanovllm.cache_spec import CacheSpec, PagedKVSpec


class CachedLayer(nn.Module):
    """A layer that keeps something between steps: it says what, and gets the memory bound.

    bind receives for a PagedKVSpec the attention backend and a tensor of its kv_shape, and for a StateSpec
    one [num_slots, *shape] for each of its shapes.
    """

    cache_spec: CacheSpec

    def bind(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


class Attention(CachedLayer):
    """Causal attention over the sequence's pages.

    num_heads, num_kv_heads: of this rank. window: tokens a query sees, itself among them.
    alibi: slopes of this rank's heads.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        ctx: BuildContext,
        *,
        scale: float,
        window: int | None = None,
        alibi: Alibi | None = None,
    ) -> None:
        super().__init__()
        assert num_heads % num_kv_heads == 0
        self.cache_spec = PagedKVSpec(num_kv_heads, head_dim, ctx.dtype, window, alibi is not None, ctx.kv_codes)
        self._scale = scale
        self._window = window
        self._alibi = alibi
        self._backend: AttentionBackend | None = None
        self._kv: torch.Tensor | None = None

    def bind(self, backend: AttentionBackend, kv: torch.Tensor) -> None:
        self._backend, self._kv = backend, kv

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """q [T, H, D], k and v [T, KH, D] -> [T, H * D]."""
        assert self._backend is not None and self._kv is not None, "bind comes before the first step"
        out = self._backend.forward(q, k, v, self._kv, batch, scale=self._scale, window=self._window, alibi=self._alibi)
        return out.flatten(1)
