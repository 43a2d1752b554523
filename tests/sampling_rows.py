"""Rows of logits, and ways to sample from them, that every maker's sampling is tried with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from kernels import normal

from nanovllm.sample_row import SampleRow
from nanovllm.sampling_params import SamplingParams


def cuts(rest: float) -> list[dict[str, Any]]:
    """Arguments of SamplingParams. rest: what the widest of them leaves out."""
    return [
        {},
        {"temperature": 0.3},
        {"min_p": 0.02},
        {"min_p": 1.0},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 900},
        {"top_p": 1e-9},
        {"top_p": 0.5},
        {"top_p": 0.97},
        {"top_p": 1 - rest},
        {"top_k": 300, "top_p": 0.9, "min_p": 1e-4, "temperature": 1.7},
        {"typical_p": 0.6},
        {"typical_p": 0.3, "top_p": 0.9, "temperature": 1.4},
        {"temperature": 0.0},
    ]


def logits_rows(size: int) -> torch.Tensor:
    """Random, flat, all equal, steep, tied, with one far ahead, nearly all forbidden, far from zero."""
    x = normal(8, size)
    x[0] *= 2.5
    x[1] *= 1e-3
    x[2] = -3.0
    x[3] *= 40
    x[4] = (x[4] * 3).round()
    x[5, size // 2] = 30.0
    x[6, torch.arange(size) % 5 != 0] = float("-inf")
    x[7] = x[7] * 3 - 1e4
    return x


def make_rows(params: SamplingParams, count: int, prompt=(), output=()) -> list[SampleRow]:
    prompt, output = (np.array(ids, dtype=np.int32) for ids in (prompt, output))
    return [SampleRow(params, seed=0, index=0, prompt=prompt, output=output) for _ in range(count)]
