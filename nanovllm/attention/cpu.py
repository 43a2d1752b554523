"""Attention over pages with torch's own CPU kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from nanovllm.attention.alibi import Alibi
from nanovllm.attention.codes import codes_reason
from nanovllm.batch import Batch
from nanovllm.cache_spec import PagedKVSpec

_KEYS = 32


@dataclass(frozen=True, slots=True)
class _Group:
    """B sequences with S query tokens each, attended in one call."""

    rows: torch.Tensor  # [B * S] where the queries stand in the batch
    positions: torch.Tensor  # [B, S] of the queries
    pages: torch.Tensor  # [B * M] padded with the sink page 0
    key_positions: torch.Tensor  # [L], L = M * block_size
    from_start: bool  # no query has keys before its chunk: plain causality is mask enough
    masks: dict[tuple[int | None, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """[B, 1, S, L]: minus infinity where a query may not look; shared by the layers."""
        key = (window, dtype)
        if key not in self.masks:
            keys, queries = self.key_positions, self.positions[:, None, :, None]
            hidden = keys > queries  # [B, 1, S, L]
            if window is not None:
                hidden |= keys <= queries - window
            self.masks[key] = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        return self.masks[key]


class CPUAttention:
    """Gathers each sequence's pages and calls scaled_dot_product_attention, once for all
    decoding sequences and once for all prompt chunks of the same size."""

    name = "cpu"

    def unsupported_reason(
        self, device: torch.device, dtype: torch.dtype, spec: PagedKVSpec, block_size: int
    ) -> str | None:
        return codes_reason(spec.codes) if device.type == "cpu" else f"runs on the CPU, not on {device.type}"

    def kv_shape(self, spec: PagedKVSpec, num_blocks: int, block_size: int) -> tuple[int, ...]:
        return (2, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)

    def prepare(self, batch: Batch, block_size: int) -> list[_Group]:
        starts, seq_lens = batch.query_start.tolist(), batch.seq_lens.tolist()
        members: dict[tuple[int, int], list[int]] = {}
        for b, seq_len in enumerate(seq_lens):
            size = starts[b + 1] - starts[b]
            # decodes are padded to the longest of them; chunks are too costly to pad
            members.setdefault((size, 0 if size == 1 else -(-seq_len // block_size)), []).append(b)
        groups = []
        for (size, _), sequences in members.items():
            first = torch.tensor([starts[b] for b in sequences])
            rows = (first[:, None] + torch.arange(size)).flatten()
            num_pages = _whole_vectors(max(seq_lens[b] for b in sequences), block_size)
            groups.append(
                _Group(
                    rows=rows,
                    positions=batch.positions[rows].view(len(sequences), size),
                    pages=F.pad(batch.block_tables[sequences, :num_pages], (0, num_pages))[:, :num_pages].flatten(),
                    key_positions=torch.arange(num_pages * block_size),
                    from_start=all(seq_lens[b] == size for b in sequences),
                )
            )
        return groups

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
        slots = kv.flatten(1, 2)
        q, k, v = (t.to(kv.dtype) for t in (q, k, v))
        slots[0].index_copy_(0, batch.slot_mapping, k)
        slots[1].index_copy_(0, batch.slot_mapping, v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for group in batch.attention:
            out[group.rows] = _attend(q[group.rows], kv, group, scale, window, alibi)
        return out


def _whole_vectors(seq_len: int, block_size: int) -> int:
    """Pages for seq_len tokens, and on to a multiple of _KEYS: the kernel sums what is left over
    from a whole vector of keys in another order, and a token's bits would depend on the page size."""
    return -(-seq_len // max(_KEYS, block_size)) * max(_KEYS, block_size) // block_size


def _attend(
    q: torch.Tensor, kv: torch.Tensor, group: _Group, scale: float, window: int | None, alibi: Alibi | None
) -> torch.Tensor:
    """q [B * S, H, D] -> [B * S, H, D]."""
    num_seqs, size = group.positions.shape
    (num_heads, head_dim), num_kv_heads = q.shape[1:], kv.shape[3]
    keys, values = (
        torch.index_select(half, 0, group.pages).view(num_seqs, -1, num_kv_heads, head_dim).transpose(1, 2)
        for half in kv
    )  # [B, KH, L, D]
    if group.from_start and window is None and alibi is None:
        mask = None
    else:
        # a bias of hundreds needs fp32 also where q is bfloat16
        mask = group.mask(window, q.dtype if alibi is None else torch.float32)
        if alibi is not None:
            mask = mask + alibi.bias(group.key_positions, group.positions)
    if size == 1 and mask is not None:
        # the query heads of a KV head stand as its rows, so that no key is read twice
        q = q.view(num_seqs, num_kv_heads, -1, head_dim)
        if mask.shape[1] > 1:
            mask = mask.view(num_seqs, num_kv_heads, -1, mask.shape[-1])
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale).view(
            num_seqs, num_heads, head_dim
        )
    q = q.view(num_seqs, size, num_heads, head_dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=num_heads != num_kv_heads
    )
    return out.transpose(1, 2).reshape(-1, num_heads, head_dim)
