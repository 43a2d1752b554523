"""Plain attention over pages, a sequence at a time: the oracle that others are tested against."""

from __future__ import annotations

import torch

from nanovllm.attention.alibi import Alibi
from nanovllm.batch import Batch
from nanovllm.cache_spec import PagedKVSpec


class ReferenceAttention:
    """Any device, dtype, head size, mask and block size; softmax in fp32. Slow on purpose."""

    name = "reference"

    def unsupported_reason(
        self, device: torch.device, dtype: torch.dtype, spec: PagedKVSpec, block_size: int
    ) -> str | None:
        return None

    def kv_shape(self, spec: PagedKVSpec, num_blocks: int, block_size: int) -> tuple[int, ...]:
        return (2, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)

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
        kv.flatten(1, 2)[:, batch.slot_mapping] = torch.stack([k, v]).to(kv.dtype)
        out = torch.empty_like(q)
        starts = batch.query_start.tolist()
        for b, seq_len in enumerate(batch.seq_lens.tolist()):
            rows = slice(starts[b], starts[b + 1])
            pages = batch.block_tables[b, : -(-seq_len // block_size)].long()
            keys, values = kv[:, pages].flatten(1, 2)[:, :seq_len].float()  # [L, KH, D] each
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
