"""Sampler: from logits to tokens, each row by its own parameters and its own random stream.

Every cut keeps or drops tokens by value, and the draw walks the vocabulary in order with one
uniform number, so that a row's token depends on its logits, its seed and its index alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from nanovllm.layers.logits_processors import process_logits
from nanovllm.ops.base import SamplingOps
from nanovllm.ops.logprob_table import LogprobTable
from nanovllm.sample_row import SampleRow, TokenLogprobs
from nanovllm.transfer import to_device, to_host

T = TypeVar("T")

# SplitMix64's; made once, as numpy takes longer over them than over a row
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


@dataclass(frozen=True, slots=True)
class Sampled:
    """token_ids: int64 [R] on the logits' device. wanted: the rows that `logprobs` is of."""

    token_ids: torch.Tensor
    wanted: list[int]
    logprobs: LogprobTable | None

    def to_host(self, make: Callable[[np.ndarray, list[TokenLogprobs | None]], T]) -> Future[T]:
        """What `make` makes of the tokens and of each row's log probabilities, which arrive together."""
        tensors = [self.token_ids] if self.logprobs is None else [self.token_ids, self.logprobs.values]
        return to_host(tensors, lambda token_ids, *found: make(token_ids, self._by_row(*found)))

    def _by_row(self, *found: np.ndarray) -> list[TokenLogprobs | None]:
        rows: list[TokenLogprobs | None] = [None] * len(self.token_ids)
        if self.logprobs is not None:
            for i, logprobs in zip(self.wanted, self.logprobs.read(*found), strict=True):
                rows[i] = logprobs
        return rows


def sample(
    logits: torch.Tensor, rows: Sequence[SampleRow], ops: SamplingOps, last: torch.Tensor | None = None
) -> Sampled:
    """Draw a token for each row of fp32 logits [R, V], which are changed in place; and, for rows that ask, log
    probabilities of the unchanged logits.

    last: int64 [R] on their device: the last tokens of the rows that wait for them (`awaits_token`).
    """
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    places = to_device([np.array(wanted)], logits.device)[0] if 0 < len(wanted) < len(rows) else slice(None)
    raw = ops.log_softmax(logits[places]) if wanted else None
    process_logits(logits, rows, ops, last)
    greedy = all(row.params.greedy for row in rows)
    drawn = ops.argmax(logits) if greedy else ops.draw(logits, rows, uniforms(rows))
    if raw is None:
        return Sampled(drawn, wanted, None)
    return Sampled(drawn, wanted, ops.token_logprobs(raw, drawn[places], [rows[i].params.logprobs for i in wanted]))


def uniforms(rows: Sequence[SampleRow]) -> np.ndarray:
    """One float64 in [0, 1) a row: SplitMix64 (Steele et al. 2014) of the seed, then of the index."""
    seeds = np.array([row.seed & (2**64 - 1) for row in rows], dtype=np.uint64)
    indices = np.array([row.index for row in rows], dtype=np.uint64)
    bits = _splitmix64(_splitmix64(seeds) + indices)
    return (bits >> _SHIFTS[3]) * 2.0**-53


def _splitmix64(state: np.ndarray) -> np.ndarray:
    z = state + _STEP  # wraps around, as it should
    z = (z ^ (z >> _SHIFTS[0])) * _FACTORS[0]
    z = (z ^ (z >> _SHIFTS[1])) * _FACTORS[1]
    return z ^ (z >> _SHIFTS[2])
