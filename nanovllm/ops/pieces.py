"""Rows of a weight, some at a time: what is worked out of them is small, and on CPUs stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_WEIGHTS, _LAUNCHED = 1 << 16, 1 << 22
_PANELS = 32  # rows that kernels keep together


def weights_of_piece(device: torch.device) -> int:
    """What a cache holds, or what is worth a launch."""
    return _WEIGHTS if device.type == "cpu" else _LAUNCHED


def row_pieces(rows: int, cols: int, weights: int = _WEIGHTS) -> Iterator[slice]:
    """Slices of whole pairs of panels, but for the last."""
    step = max(1, weights // (cols * _PANELS)) * _PANELS
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))
