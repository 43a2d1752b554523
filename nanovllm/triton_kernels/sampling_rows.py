"""Rows of logits as the sampling kernels see them: scaled by temperature, weighed, and the windows around a peak."""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(2048)  # tokens of a program
WINDOWS = tl.constexpr(8)  # one within the other: tokens that are at most 3, 6, ... 24 below the peak
CAPACITY = tl.constexpr(8192)  # candidates of a row; where there are more, the row itself is searched
SETTINGS = tl.constexpr(6)  # of a row
UNITS = tl.constexpr(2.0**42)  # in the mass of the likeliest token; a vocabulary's sum fits into 63 bits


@triton.jit
def scaled(row, token, count, temperature):
    """Logits [N] of these tokens over the temperature; NaN, and what is not below count, as minus infinity."""
    x = tl.load(row + token, token < count, float("-inf"))
    return tl.div_rn(tl.where(x == x, x, float("-inf")), temperature)


@triton.jit
def masses(x, peak):
    """exp(x - peak), in fp32 and as a whole number of units; zero where that is NaN."""
    weight = tl.exp(x - peak)
    weight = tl.where(weight >= 0.0, weight, 0.0)
    return weight, (weight * UNITS).to(tl.int64)


@triton.jit
def peak_of(peaks, chunks, WIDTH: tl.constexpr):
    chunk = tl.arange(0, WIDTH)
    return tl.max(tl.load(peaks + chunk, chunk < chunks, float("-inf")), 0)


@triton.jit
def has_cuts(settings):
    cuts = (tl.load(settings + 1) > 0) | (tl.load(settings + 2) < 1) | (tl.load(settings + 3) > 0)
    return cuts | (tl.load(settings + 4) < 1)


@triton.jit
def edge(window):
    """How far below the peak the window ends. Whole numbers, so that every kernel finds the same tokens in it."""
    return 3.0 * (window + 1)


@triton.jit
def window_of(settings, counts, sums, totals, chunks, WIDTH: tl.constexpr):
    """The first window that holds all that the cuts keep, and how many tokens it has; WINDOWS where there is none,
    or more than CAPACITY in it.

    top_k's are in it if it has so many tokens; min_p's, if the peak's weight falls below at the edge; top_p's, if there
    is no other cut, if it has the mass, with a margin as the sums are fp32. The typical cut alone may keep any token.
    """
    top_k, top_p, min_p = tl.load(settings + 1), tl.load(settings + 2), tl.load(settings + 3)
    chunk, window = tl.arange(0, WIDTH), tl.arange(0, WINDOWS)
    place = chunk[:, None] * WINDOWS + window[None, :]
    known = place < chunks * WINDOWS
    count = tl.sum(tl.load(counts + place, known, 0), 0)
    held = tl.sum(tl.load(sums + place, known, 0.0), 0)
    total = tl.sum(tl.load(totals + chunk, chunk < chunks, 0), 0).to(tl.float32) / UNITS
    wanted = tl.where(top_k > 0, top_k, float("inf"))
    share = tl.where((top_k > 0) | (min_p > 0), float("inf"), top_p + 1e-4) * total
    enough = (count >= wanted) | (held >= share) | (tl.exp(-edge(window)) < 0.999 * min_p)
    first = tl.sum(tl.where(enough, 0, 1), 0)
    size = tl.sum(tl.where(window == first, count, 0), 0)
    return tl.where(size > CAPACITY, WINDOWS, first), size
