"""Plain attention over pages, a sequence at a time: the oracle that others are tested against."""

from __future__ import annotations

import torch

from nanovllm.attention.alibi import Alibi
from nanovllm.attention.codes import LARGEST, encode, split_pages
from nanovllm.batch import Batch
from nanovllm.cache_spec import PagedKVSpec


class ReferenceAttention:
    """Any device, dtype, codes, head size, mask and block size; softmax in fp32. Slow on purpose."""

    name = "reference"

    def unsupported_reason(
        self, device: torch.device, dtype: torch.dtype, spec: PagedKVSpec, block_size: int
    ) -> str | None:
        return None

    def kv_shape(self, spec: PagedKVSpec, num_blocks: int, block_size: int) -> tuple[int, ...]:
        return (2, num_blocks, block_size, spec.num_kv_heads, spec.row)

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
        block_size, num_heads = kv.shape[2], q.shape[1]
        _store(torch.stack([k, v]), kv, batch.slot_mapping)
        out = torch.empty_like(q)
        starts = batch.query_start.tolist()
        for b, seq_len in enumerate(batch.seq_lens.tolist()):
            rows = slice(starts[b], starts[b + 1])
            pages = batch.block_tables[b, : -(-seq_len // block_size)].long()
            keys, values = _load(kv, pages)[:, :seq_len]  # [L, KH, D] each
            groups = num_heads // keys.shape[1]
            keys = keys.repeat_interleave(groups, dim=1)
            values = values.repeat_interleave(groups, dim=1)
            positions = torch.arange(seq_len, device=q.device)
            distance = positions - batch.positions[rows, None]  # [S, L]
            scores = torch.einsum("shd,lhd->hsl", q[rows].float(), keys) * scale
            if alibi is not None:
                scores += alibi.bias(positions, batch.positions[rows])
            hidden = distance > 0
            if window is not None:
                hidden |= distance <= -window
            scores.masked_fill_(hidden, float("-inf"))
            out[rows] = torch.einsum("hsl,lhd->shd", scores.softmax(-1), values).to(q.dtype)
        return out


def _store(new: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor) -> None:
    """Keys and values [2, T, KH, D] into their slots."""
    pages, offsets = slots // kv.shape[2], slots % kv.shape[2]
    if kv.dtype not in LARGEST:
        kv[:, pages, offsets] = new.to(kv.dtype)
        return
    codes, scales = split_pages(kv)
    codes[:, pages, offsets], scales[:, pages, offsets] = encode(new, kv.dtype)


def _load(kv: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """The keys and values of these pages in fp32, [2, tokens, KH, D]."""
    if kv.dtype not in LARGEST:
        return kv[:, pages].flatten(1, 2).float()
    codes, scales = split_pages(kv)
    return (codes[:, pages].float() * scales[:, pages, ..., None]).flatten(1, 2)
