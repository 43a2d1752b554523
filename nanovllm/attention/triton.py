"""Attention of triton_kernels/: reads pages as they lie, for prompt chunks and decodes, on NVIDIA GPUs."""

from __future__ import annotations

import importlib.util

import torch

from nanovllm.attention.alibi import Alibi
from nanovllm.batch import Batch
from nanovllm.cache_spec import PagedKVSpec

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_HEAD = 256
_LEAST_BLOCK = 16


class TritonAttention:
    """Queries and weights are rounded to the cache's dtype, sums are fp32.

    Sequences with one query in the step are served by one kernel, others by another, in the same step; both grids
    follow from what the host knows, so that a step can be captured as a CUDA graph.
    """

    name = "triton"

    def unsupported_reason(
        self, device: torch.device, dtype: torch.dtype, spec: PagedKVSpec, block_size: int
    ) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install 'nanovllm[gpu]'"
        if dtype not in _DTYPES:
            return f"has no kernels for {dtype}"
        if spec.head_dim > _MAX_HEAD:
            return f"takes head sizes up to {_MAX_HEAD}, not {spec.head_dim}; set attention_backend='reference'"
        if block_size < _LEAST_BLOCK or block_size & (block_size - 1):
            return f"needs kvcache_block_size to be a power of two from {_LEAST_BLOCK}, not {block_size}"
        return _device_reason(device, dtype)

    def kv_shape(self, spec: PagedKVSpec, num_blocks: int, block_size: int) -> tuple[int, ...]:
        return (2, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)

    def prepare(self, batch: Batch, block_size: int) -> object:
        """QueryTiles, or None where every sequence has one query."""
        from nanovllm.triton_kernels.prompt_attention import QueryTiles

        return QueryTiles(batch) if batch.max_query_len > 1 else None

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv: torch.Tensor,
        batch: Batch,
        *,
        scale: float,
        window: int | None = None,
        alibi: Alibi | None = None,
    ) -> torch.Tensor:
        # imported here, as not every machine has triton
        from nanovllm.triton_kernels.attention_tile import Scoring
        from nanovllm.triton_kernels.decode_attention import decode_attention
        from nanovllm.triton_kernels.prompt_attention import prompt_attention
        from nanovllm.triton_kernels.store_kv import store_kv

        store_kv(_side_by_side(k), _side_by_side(v), kv, batch.slot_mapping)
        scoring = Scoring(scale, window)
        if alibi is not None:
            scoring = Scoring(scale, window, alibi.slopes, "rounded" if alibi.rounded else "distance", alibi.factor)
        queries = _side_by_side(q.to(kv.dtype))
        out = torch.empty(q.shape, dtype=kv.dtype, device=q.device)
        if batch.attention is not None:
            prompt_attention(queries, kv, out, batch, batch.attention, scoring)
        if len(batch.seq_lens) > 1 or batch.max_query_len == 1:
            decode_attention(queries, kv, out, batch, scoring)
        return out.to(q.dtype)


def _device_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cpu":
        import triton

        if not triton.knobs.runtime.interpret:
            return "runs on NVIDIA GPUs; on the CPU only for tests, with TRITON_INTERPRET=1 set before the start"
        return "Triton's interpreter cannot multiply bfloat16; set dtype" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"runs on NVIDIA GPUs, not on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0, and this GPU has {'.'.join(map(str, capability))}"
    return None


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """Numbers of a head stand side by side; heads and tokens may lie apart."""
    return x if x.stride(2) == 1 else x.contiguous()
