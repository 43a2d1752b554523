"""Attention of csrc/: reads pages as they lie, for prompt chunks and decodes in one call."""

from __future__ import annotations

import torch

from nanovllm.attention.alibi import Alibi
from nanovllm.attention.codes import codes_reason
from nanovllm.batch import Batch
from nanovllm.cache_spec import PagedKVSpec
from nanovllm.ops.library import Library, library_or_reason

_TILE = 16  # keys that lie side by side; csrc/attention.h
_MAX_HEAD = 256
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # of what pages hold; csrc/kernels.h


class NativeAttention:
    """A token's bits depend on its own keys alone: neither on the batch nor on how a prompt is cut,
    nor on the threads. Queries and weights are rounded to the cache's dtype, sums are fp32.

    Where pages hold int8, queries and weights are integers of 16 bits relative to the largest of a query and of a span,
    and sums are exact. Keys are the codes times their scale; a value's scale is part of its weight.
    """

    name = "native"

    def unsupported_reason(
        self, device: torch.device, dtype: torch.dtype, spec: PagedKVSpec, block_size: int
    ) -> str | None:
        if device.type != "cpu":
            return f"runs on the CPU, not on {device.type}"
        if dtype not in (torch.bfloat16, torch.float32):
            return f"has no kernels for {dtype}"
        if block_size % _TILE:
            return f"needs pages of {_TILE} tokens or a multiple, not {block_size}"
        if spec.head_dim % 2 or spec.head_dim > _MAX_HEAD:
            return f"takes even head sizes up to {_MAX_HEAD}, not {spec.head_dim}; set attention_backend='cpu'"
        if reason := codes_reason(spec.codes, taken=torch.int8):
            return reason
        library = library_or_reason()
        return None if isinstance(library, Library) else library

    def kv_shape(self, spec: PagedKVSpec, num_blocks: int, block_size: int) -> tuple[int, ...]:
        return (2, num_blocks, spec.num_kv_heads, block_size, spec.row)

    def prepare(self, batch: Batch, block_size: int) -> None:
        return None

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
        library = library_or_reason()
        assert isinstance(library, Library)
        (kv_heads, block_size), (heads, head_dim) = kv.shape[2:4], q.shape[1:]
        pages = kv[0].data_ptr(), kv[1].data_ptr(), _FORMATS[kv.dtype]
        threads, dtype = torch.get_num_threads(), q.dtype
        q, k, v = map(_fp32_heads, (q, k, v))
        library.store_kv(
            *(k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0), len(k), batch.slot_mapping.data_ptr()),
            *(*pages, block_size, kv_heads, head_dim, threads),
        )
        out = torch.empty(len(q), heads, head_dim)
        library.attention(
            *(q.data_ptr(), q.stride(0), out.data_ptr(), *pages),
            *(block_size, heads, kv_heads, head_dim),
            *(len(batch.seq_lens), batch.query_start.data_ptr(), batch.seq_lens.data_ptr()),
            *(batch.block_tables.data_ptr(), batch.block_tables.stride(0)),
            *(scale, window or 0),
            *((None, 0, 1.0) if alibi is None else (alibi.slopes.data_ptr(), alibi.rounded, alibi.factor)),
            threads,
        )
        return out.to(dtype)


def _fp32_heads(x: torch.Tensor) -> torch.Tensor:
    """[T, H, D] in fp32 with heads side by side; tokens may lie apart."""
    x = x.float()
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
