"""Rows of a weight, some at a time: what is worked out of them is small, and stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator

_WEIGHTS = 1 << 16
_PANELS = 32  # rows that kernels keep together


def row_pieces(rows: int, cols: int) -> Iterator[slice]:
    """Slices of whole pairs of panels, but for the last."""
    step = max(1, _WEIGHTS // (cols * _PANELS)) * _PANELS
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))
