"""Attention of the flash-attn package (Dao 2023; Shah et al. 2024), for those who have it installed."""

from __future__ import annotations

import importlib
import importlib.util
import inspect

import torch

from nanovllm.attention.alibi import Alibi
from nanovllm.attention.gpu import flash_reason, gpu_reason, key_starts, paged_shape, side_by_side, store
from nanovllm.batch import Batch
from nanovllm.cache_spec import PagedKVSpec

_PAGE = 256  # tokens; version 2 reads pages of a multiple


class FlashAttention:
    """Version 3 on Hopper, if it is installed (`flash_attn_interface`), else version 2 (`flash_attn`)."""

    name = "flash"

    def unsupported_reason(
        self, device: torch.device, dtype: torch.dtype, spec: PagedKVSpec, block_size: int
    ) -> str | None:
        reason = gpu_reason(device)
        if reason is None and not _has_version_3(device):
            if importlib.util.find_spec("flash_attn") is None:
                reason = "flash-attn is not installed"
            elif block_size % _PAGE:
                reason = f"flash-attn 2 reads pages of a multiple of {_PAGE} tokens: set kvcache_block_size={_PAGE}"
        return reason or flash_reason(dtype, spec)

    def kv_shape(self, spec: PagedKVSpec, num_blocks: int, block_size: int) -> tuple[int, ...]:
        return paged_shape(spec, num_blocks, block_size)

    def prepare(self, batch: Batch, block_size: int) -> torch.Tensor | None:
        """`key_starts`, which version 2 asks for where a sequence has several queries."""
        return key_starts(batch) if batch.max_query_len > 1 else None

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
        attend = _version_3 if _has_version_3(q.device) else _version_2
        queries = side_by_side(q.to(kv.dtype))
        return attend(queries, kv, batch, scale, (-1 if window is None else window - 1, 0)).to(q.dtype)


def _has_version_3(device: torch.device) -> bool:
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    return importlib.util.find_spec("flash_attn_interface") is not None


def _version_3(
    q: torch.Tensor, kv: torch.Tensor, batch: Batch, scale: float, window_size: tuple[int, int]
) -> torch.Tensor:
    return importlib.import_module("flash_attn_interface").flash_attn_with_kvcache(
        *(q, kv[0], kv[1]),
        cache_seqlens=batch.seq_lens,
        page_table=batch.block_tables,
        cu_seqlens_q=batch.query_start,
        max_seqlen_q=batch.max_query_len,
        softmax_scale=scale,
        causal=True,
        window_size=window_size,
    )


def _version_2(
    q: torch.Tensor, kv: torch.Tensor, batch: Batch, scale: float, window_size: tuple[int, int]
) -> torch.Tensor:
    flash_attn = importlib.import_module("flash_attn")
    shared = {
        "block_table": batch.block_tables,
        "softmax_scale": scale,
        "causal": True,
        "window_size": window_size,
    }
    if batch.attention is None:
        return flash_attn.flash_attn_with_kvcache(
            q[:, None], kv[0], kv[1], cache_seqlens=batch.seq_lens, **shared
        ).squeeze(1)
    varlen = flash_attn.flash_attn_varlen_func
    # versions that divide contexts here lose rows of sequences after the first (flash-attention issue 1217)
    whole = {"num_splits": 1} if "num_splits" in inspect.signature(varlen).parameters else {}
    return varlen(
        *(q, kv[0], kv[1]),
        cu_seqlens_q=batch.query_start,
        cu_seqlens_k=batch.attention,
        max_seqlen_q=batch.max_query_len,
        max_seqlen_k=batch.max_seq_len,
        **shared,
        **whole,
    )
