"""Log probabilities that were found, on their way to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.sample_row import TokenLogprobs


@dataclass(frozen=True, slots=True)
class LogprobTable:
    """What was found at R positions, where it was found.

    values: int32 [R, 3 + 2 k]: the actual token's rank, the tokens (the actual one first, then the likeliest in order),
        and the bits of their fp32 log probabilities.
    sizes: [R] how many of the k likeliest each position was asked for.
    """

    values: torch.Tensor
    sizes: Sequence[int]

    def read(self, values: np.ndarray) -> list[TokenLogprobs]:
        """values: the same, on the host."""
        middle = (values.shape[1] + 1) // 2
        token_ids = values[:, 1:middle].astype(np.int64)
        logprobs = np.ascontiguousarray(values[:, middle:]).view(np.float32)
        return [
            TokenLogprobs(ids[: 1 + size], found[: 1 + size], rank)
            for ids, found, size, rank in zip(token_ids, logprobs, self.sizes, values[:, 0].tolist(), strict=True)
        ]


def table_of(
    ranks: torch.Tensor, token_ids: torch.Tensor, logprobs: torch.Tensor, sizes: Sequence[int]
) -> LogprobTable:
    """ranks [R], token_ids [R, 1 + k], and all log probabilities fp32 [R, V]."""
    values = logprobs.gather(1, token_ids).view(torch.int32)
    return LogprobTable(torch.cat([ranks[:, None].int(), token_ids.int(), values], dim=1), sizes)
