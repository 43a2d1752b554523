"""Sampling of triton_kernels/: parameters go to the device in one copy, and nothing waits for what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from nanovllm.ops.logprob_table import LogprobTable, table_of
from nanovllm.ops.torch_sampling import HIGHEST_TEMPERATURE, LARGEST_PENALTY, SMALLEST_PENALTY, TorchSampling, sizes_of
from nanovllm.sample_row import SampleRow, awaits_token
from nanovllm.transfer import to_device
from nanovllm.triton_kernels.log_softmax import log_softmax
from nanovllm.triton_kernels.penalties import penalise
from nanovllm.triton_kernels.sampling import draw


class TritonSampling(TorchSampling):
    """What torch gives up to rounding; argmax is torch's."""

    def log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        return log_softmax(logits)

    def penalise(self, logits: torch.Tensor, rows: Mapping[int, SampleRow], last: torch.Tensor | None = None) -> None:
        tokens = [part for row in rows.values() for part in (row.prompt, row.output)]
        ends = np.cumsum([len(part) for part in tokens])
        table = np.empty((len(rows), 4), dtype=np.int64)
        table[:, 0] = list(rows)
        table[:, 1] = [0, *ends[1:-1:2]]
        table[:, 2], table[:, 3] = ends[::2], ends[1::2]
        strengths = np.array(
            [
                (
                    min(max(row.params.repetition_penalty, SMALLEST_PENALTY), LARGEST_PENALTY),
                    row.params.frequency_penalty,
                    row.params.presence_penalty,
                )
                for row in rows.values()
            ]
        )
        longest = int((table[:, 3] - table[:, 1]).max())
        if not longest:
            return
        awaited = table[[awaits_token(row) for row in rows.values()]]
        on_device = to_device([table, strengths, np.concatenate(tokens), awaited], logits.device)
        if len(awaited):
            assert last is not None
            seen, (waiting, _, _, ends_there) = on_device[2], on_device[3].T
            seen[ends_there - 1] = last[waiting].int()
        penalise(logits, longest, *on_device[:3])

    def token_logprobs(
        self, logprobs: torch.Tensor, token_ids: torch.Tensor, counts: Sequence[int | None]
    ) -> LogprobTable:
        vocab_size = logprobs.shape[1]
        sizes = sizes_of(counts, vocab_size)
        chosen = logprobs.gather(1, token_ids[:, None])
        ranks = (logprobs > chosen).sum(dim=1) + 1
        ids = token_ids[:, None]
        if largest := max(sizes):
            # whole numbers in the order of the floats, then against that of the ids: no two are equal
            bits = (logprobs + 0.0).view(torch.int32)
            order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32
            order += vocab_size - torch.arange(vocab_size, device=logprobs.device)
            ids = torch.cat([ids, order.topk(largest, dim=1).indices], dim=1)
        return table_of(ranks, ids, logprobs, sizes)

    def draw(self, logits: torch.Tensor, rows: Sequence[SampleRow], uniforms: np.ndarray) -> torch.Tensor:
        params = [row.params for row in rows]
        settings = np.empty((len(rows), 6))
        settings[:, 0] = [0.0 if p.greedy else min(p.temperature, HIGHEST_TEMPERATURE) for p in params]
        settings[:, 1] = [p.top_k if p.top_k < logits.shape[1] else 0 for p in params]
        settings[:, 2] = [p.top_p for p in params]
        settings[:, 3] = _rounded_up(np.array([p.min_p for p in params]))
        settings[:, 4] = [p.typical_p for p in params]
        settings[:, 5] = uniforms
        cuts = any(p.min_p or p.top_k or p.top_p != 1.0 or p.typical_p != 1.0 for p in params)
        return draw(logits, *to_device([settings], logits.device), cuts=cuts)


def _rounded_up(values: np.ndarray) -> np.ndarray:
    """To fp32, which the weights have that are compared with them."""
    rounded = values.astype(np.float32)
    return np.where(rounded < values, np.nextafter(rounded, np.float32(2)), rounded)
