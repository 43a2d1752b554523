"""Attention of torch.nn.attention.varlen: FlashAttention-2 as torch brings it along."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import Any

import torch

from nanovllm.attention.alibi import Alibi
from nanovllm.attention.gpu import flash_reason, gpu_reason, key_starts, paged_shape, side_by_side, store
from nanovllm.batch import Batch
from nanovllm.cache_spec import PagedKVSpec

_MODULE = "torch.nn.attention.varlen"
_PAGE = 256


class TorchVarlenAttention:
    """Contexts are not divided, so that few long sequences decode slowly: with pages, torch 2.13's division gives
    NaN at times and loses rows (pytorch issue 194167)."""

    name = "torch_varlen"

    def unsupported_reason(
        self, device: torch.device, dtype: torch.dtype, spec: PagedKVSpec, block_size: int
    ) -> str | None:
        reason = gpu_reason(device)
        if reason is None and not _reads_pages():
            reason = f"torch {torch.__version__} has no varlen_attn that reads pages; torch 2.12 has"
        if reason is None and block_size % _PAGE:
            reason = f"reads pages of a multiple of {_PAGE} tokens: set kvcache_block_size={_PAGE}"
        return reason or flash_reason(dtype, spec)

    def kv_shape(self, spec: PagedKVSpec, num_blocks: int, block_size: int) -> tuple[int, ...]:
        return paged_shape(spec, num_blocks, block_size)

    def prepare(self, batch: Batch, block_size: int) -> torch.Tensor:
        return key_starts(batch)

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
        assert alibi is None
        store(k, v, kv, batch)
        return _varlen_attn()(
            *(side_by_side(q.to(kv.dtype)), kv[0], kv[1], batch.query_start, batch.attention),
            *(batch.max_query_len, batch.max_seq_len),
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=q.shape[1] != kv.shape[3],
            seqused_k=batch.seq_lens,
            block_table=batch.block_tables,
            num_splits=1,
        ).to(q.dtype)


def _reads_pages() -> bool:
    if importlib.util.find_spec(_MODULE) is None:
        return False
    return {"block_table", "num_splits"} <= inspect.signature(_varlen_attn()).parameters.keys()


def _varlen_attn() -> Any:
    return importlib.import_module(_MODULE).varlen_attn
