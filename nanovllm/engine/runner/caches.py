"""The memory of what layers keep between steps: allocated for all layers together, and bound to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nanovllm.attention.base import AttentionBackend
from nanovllm.cache_spec import CachePlan, PagedKVSpec, StateSpec
from nanovllm.host_memory import mapped_zeros
from nanovllm.layers.attention import CachedLayer


def bind_caches(
    layers: Sequence[CachedLayer],
    plan: CachePlan,
    *,
    backend: AttentionBackend,
    block_size: int,
    device: torch.device,
) -> list[torch.Tensor]:
    """Give each layer its tensors, zeroed; those of recurrent states, [slots, ...] each, are returned."""
    states: list[torch.Tensor] = []
    for layer in layers:
        spec = layer.cache_spec
        if isinstance(spec, PagedKVSpec):
            layer.bind(backend, _zeros(backend.kv_shape(spec, plan.num_blocks, block_size), spec.stored, device))
        elif isinstance(spec, StateSpec):
            tensors = [
                _zeros((plan.num_slots, *shape), dtype, device)
                for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
            ]
            layer.bind(*tensors)
            states += tensors
    return states


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeroed, because masked-out garbage times zero must not be NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return mapped_zeros(shape, dtype)
