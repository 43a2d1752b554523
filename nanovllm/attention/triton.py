"""Attention of triton_kernels/: reads pages as they lie, for prompt chunks and decodes, on NVIDIA GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nanovllm.attention.alibi import Alibi
from nanovllm.attention.codes import codes_reason
from nanovllm.attention.gpu import gpu_reason, has_triton, paged_shape, side_by_side, store
from nanovllm.batch import Batch
from nanovllm.cache_spec import PagedKVSpec

if TYPE_CHECKING:  # not every machine has triton
    from nanovllm.triton_kernels.attention_tile import Scoring

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_HEAD = 256
_LEAST_BLOCK = 16


class TritonAttention:
    """Queries and weights are rounded to the cache's dtype, unless it has codes, and sums are fp32.

    Sequences with one query in the step are served by one kernel, others by another, in the same step; both grids
    follow from what the host knows, so that a step can be captured as a CUDA graph.
    """

    name = "triton"

    def unsupported_reason(
        self, device: torch.device, dtype: torch.dtype, spec: PagedKVSpec, block_size: int
    ) -> str | None:
        if not has_triton():
            return "triton is not installed; pip install -e '.[gpu]'"
        reason = _interpreter_reason(dtype) if device.type == "cpu" else gpu_reason(device)
        if reason is not None:
            return reason
        if reason := codes_reason(spec.codes, taken=torch.float8_e4m3fn):
            return reason
        if dtype not in _DTYPES:
            return f"has no kernels for {dtype}"
        if spec.head_dim > _MAX_HEAD:
            return f"takes head sizes up to {_MAX_HEAD}, not {spec.head_dim}; set attention_backend='reference'"
        if spec.codes and dtype == torch.float32 and spec.head_dim > _MAX_HEAD // 2:
            return f"has no room for float32 heads of {spec.head_dim} beside codes; set kv_cache_dtype='auto'"
        if block_size < _LEAST_BLOCK or block_size & (block_size - 1):
            return f"needs kvcache_block_size to be a power of two from {_LEAST_BLOCK}, not {block_size}"
        return None

    def kv_shape(self, spec: PagedKVSpec, num_blocks: int, block_size: int) -> tuple[int, ...]:
        return paged_shape(spec, num_blocks, block_size)

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

        store(k, v, kv, batch)
        scoring = Scoring(scale, window)
        if alibi is not None:
            scoring = Scoring(scale, window, alibi.slopes, "rounded" if alibi.rounded else "distance", alibi.factor)
        queries = side_by_side(q if kv.dtype == torch.float8_e4m3fn else q.to(kv.dtype))
        out = torch.empty(q.shape, dtype=queries.dtype, device=q.device)
        self._attend(queries, kv, out, batch, scoring)
        return out.to(q.dtype)

    def _attend(self, q: torch.Tensor, kv: torch.Tensor, out: torch.Tensor, batch: Batch, scoring: Scoring) -> None:
        from nanovllm.triton_kernels.decode_attention import decode_attention
        from nanovllm.triton_kernels.prompt_attention import prompt_attention

        if batch.attention is not None:
            prompt_attention(q, kv, out, batch, batch.attention, scoring)
        if len(batch.seq_lens) > 1 or batch.max_query_len == 1:
            decode_attention(q, kv, out, batch, scoring)


class InvariantTritonAttention(TritonAttention):
    """A query's bits do not depend on the other ones: the kernel of prompt chunks has all sequences."""

    def prepare(self, batch: Batch, block_size: int) -> object:
        from nanovllm.triton_kernels.prompt_attention import QueryTiles

        return QueryTiles(batch, invariant=True)

    def _attend(self, q: torch.Tensor, kv: torch.Tensor, out: torch.Tensor, batch: Batch, scoring: Scoring) -> None:
        from nanovllm.triton_kernels.prompt_attention import prompt_attention

        prompt_attention(q, kv, out, batch, batch.attention, scoring)


def _interpreter_reason(dtype: torch.dtype) -> str | None:
    """For tests on the CPU, where TRITON_INTERPRET=1 was set before the start."""
    import triton

    if not triton.knobs.runtime.interpret:
        return "runs on NVIDIA GPUs, not on cpu"
    return "Triton's interpreter cannot multiply bfloat16: set dtype='float32'" if dtype == torch.bfloat16 else None
