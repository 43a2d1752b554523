"""The last step of drawing: one program a row finds the floor of what its cuts keep, and the token."""

from __future__ import annotations

import triton
import triton.language as tl

from nanovllm.triton_kernels.sampling_rows import (
    CAPACITY,
    CHUNK,
    SETTINGS,
    UNITS,
    WINDOWS,
    edge,
    has_cuts,
    masses,
    scaled,
    window_of,
)
from nanovllm.triton_kernels.variant import Variant

BLOCK = tl.constexpr(1024)  # numbers that are looked at together
LOWEST = tl.constexpr(-2139095041)  # `ordered` of minus infinity
OUT = tl.constexpr(-2139095042)  # below every rank
CHOICE_WARPS = 8
PIVOTS = tl.constexpr(8)  # a search's range becomes a ninth with each reading of the list


@triton.jit(do_not_specialize=["vocab"])
def choose_kernel(
    logits, stride, vocab, settings, peaks, totals, counts, sums, places, values, ids, out, chunks, WIDTH: tl.constexpr
):  # fmt: skip
    """out: tokens [R]; the others as in `sampling.py`. A row without a finite peak gets its first largest token."""
    row = tl.program_id(0).to(tl.int64)
    settings += row * SETTINGS
    first = row * chunks
    chunk = tl.arange(0, WIDTH)
    peak, best = tl.max(tl.load(peaks + first + chunk, chunk < chunks, float("-inf")), 0, return_indices=True)
    token = tl.load(places + first + best)
    temperature = tl.load(settings).to(tl.float32)
    if temperature > 0:
        peak = tl.div_rn(peak, temperature)
        if tl.abs(peak) < float("inf"):
            logits += row * stride
            if has_cuts(settings):
                window, size = window_of(
                    settings, counts + first * WINDOWS, sums + first * WINDOWS, totals + first, chunks, WIDTH
                )
                listed = window < WINDOWS
                if listed:
                    logits = values + row * CAPACITY
                size = tl.where(listed, size, vocab)
                temperature = tl.where(listed, 1.0, temperature)
                total = tl.sum(tl.load(totals + first + chunk, chunk < chunks, 0), 0)
                least = tl.where(listed, ordered(peak - edge(window) - 1.0), LOWEST)
                token = cut_and_draw(logits, size, temperature, peak, least.to(tl.int64), total, settings)
                if listed:
                    token = tl.load(ids + row * CAPACITY + token)
            else:
                token = draw_of_all(logits, vocab, temperature, peak, settings, totals + first, chunks, WIDTH)
    tl.store(out + row, token.to(tl.int64))


@triton.jit
def ordered(x):
    """Whole numbers, int32, in the order of the floats; equal for equal ones."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def draw_of_all(logits, vocab, temperature, peak, settings, totals, chunks, WIDTH: tl.constexpr):
    """The chunk where the mass exceeds the uniform's share, then the token in it."""
    chunk = tl.arange(0, WIDTH)
    mass = tl.load(totals + chunk, chunk < chunks, 0)
    target = share_of(tl.load(settings + 5), tl.sum(mass, 0))
    found = tl.minimum(tl.sum((tl.cumsum(mass, 0) <= target).to(tl.int32), 0), chunks - 1)
    before = tl.sum(tl.where(chunk < found, mass, 0), 0)
    token = found * CHUNK + tl.arange(0, CHUNK)
    _, mass = masses(scaled(logits, token, vocab, temperature), peak)
    place = found * CHUNK + tl.sum((before + tl.cumsum(mass, 0) <= target).to(tl.int32), 0)
    return tl.minimum(place, vocab - 1)


@triton.jit
def cut_and_draw(row, count, temperature, peak, least, total, settings):
    """The place of the token in a list of logits, all of which reach the key `least`. total: the whole row's mass."""
    top_k, top_p, min_p = tl.load(settings + 1).to(tl.int32), tl.load(settings + 2), tl.load(settings + 3)
    typical_p = tl.load(settings + 4)
    low, high = least, ordered(peak).to(tl.int64) + 1
    if min_p > 0:
        low = lowest_above(row, count, temperature, peak, min_p.to(tl.float32), low)
    if top_k > 0:
        low = reached_by(row, count, temperature, top_k, low, high)
    if top_p < 1:
        if (min_p > 0) | (top_k > 0):
            total = mass_between(row, count, temperature, peak, low, high)
        share = top_p * total.to(tl.float64)
        low = heavy_enough(row, count, temperature, peak, share, low, high, low, 0.0, False)
    if typical_p < 1:
        low, high = typical_range(row, count, temperature, peak, typical_p, low, high)
    target = share_of(tl.load(settings + 5), mass_between(row, count, temperature, peak, low, high))
    place, start, before = 0, 0, target * 0
    while (before <= target) & (start < count):
        x = scaled(row, start + tl.arange(0, BLOCK), count, temperature)
        _, mass = masses(x, peak)
        mass = tl.where((ordered(x) >= low) & (ordered(x) < high), mass, 0)
        place += tl.sum((before + tl.cumsum(mass, 0) <= target).to(tl.int32), 0)
        before += tl.sum(mass, 0)
        start += BLOCK
    return tl.minimum(place, count - 1)


@triton.jit
def share_of(uniform, total):
    """Mass that the drawn token is the first to exceed, below the total."""
    return tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def lowest_above(row, count, temperature, peak, min_p, low):
    """The lowest key of a weight of at least min_p."""
    found = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    for start in range(0, count, BLOCK):
        x = scaled(row, start + tl.arange(0, BLOCK), count, temperature)
        weight, _ = masses(x, peak)
        found = tl.minimum(found, tl.where(weight >= min_p, ordered(x), 0x7FFFFFFF))
    return tl.maximum(tl.min(found, 0).to(tl.int64), low)


@triton.jit
def mass_between(row, count, temperature, peak, low, high):
    """Of keys from low on, below high."""
    found = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, count, BLOCK):
        x = scaled(row, start + tl.arange(0, BLOCK), count, temperature)
        _, mass = masses(x, peak)
        found += tl.where((ordered(x) >= low) & (ordered(x) < high), mass, 0)
    return tl.sum(found, 0)


@triton.jit
def reached_by(row, count, temperature, top_k, low, high):
    """The largest key from low on, below high, that top_k numbers reach; low if they are not so many."""
    while high - low > 1:
        step = (high - low + PIVOTS) // (PIVOTS + 1)
        pivots = low + step * (tl.arange(0, PIVOTS) + 1)
        found = tl.zeros((PIVOTS, BLOCK), tl.int32)
        for start in range(0, count, BLOCK):
            key = ordered(scaled(row, start + tl.arange(0, BLOCK), count, temperature))
            found += (key[None, :] >= pivots[:, None]).to(tl.int32)
        low += step * tl.sum((tl.sum(found, 1) >= top_k).to(tl.int64), 0)
        high = tl.minimum(high, low + step)
    return low


@triton.jit
def rank_of(x, peak, least, mean, TYPICAL: tl.constexpr):
    """Whole numbers in the order in which numbers are kept: their keys; or, of those whose key is at least `least`, how
    near their distance from the peak is to the mean one, from 0 down."""
    rank = ordered(x)
    if TYPICAL:
        apart = tl.abs(peak.to(tl.float64) - x.to(tl.float64) - mean).to(tl.float32)
        rank = tl.where(rank >= least, -apart.to(tl.int32, bitcast=True), OUT)
    return rank


@triton.jit
def heavy_enough(row, count, temperature, peak, share, low, high, least, mean, TYPICAL: tl.constexpr):
    """The largest rank from low on, below high, where the numbers that reach it have this mass."""
    while high - low > 1:
        step = (high - low + PIVOTS) // (PIVOTS + 1)
        pivots = low + step * (tl.arange(0, PIVOTS) + 1)
        found = tl.zeros((PIVOTS, BLOCK), tl.int64)
        for start in range(0, count, BLOCK):
            x = scaled(row, start + tl.arange(0, BLOCK), count, temperature)
            _, mass = masses(x, peak)
            reached = rank_of(x, peak, least, mean, TYPICAL)[None, :] >= pivots[:, None]
            found += tl.where(reached, mass[None, :], 0)
        low += step * tl.sum((tl.sum(found, 1).to(tl.float64) >= share).to(tl.int64), 0)
        high = tl.minimum(high, low + step)
    return low


@triton.jit
def typical_range(row, count, temperature, peak, typical_p, low, high):
    """Of keys from low on, below high, the range of those that the typical cut keeps (Meister et al. 2022).

    A token's surprise less the entropy is its distance from the peak less the mean distance: what is kept lies around
    one point, and is a range of keys too.
    """
    mean = mean_distance(row, count, temperature, peak, low)
    share = typical_p * mass_between(row, count, temperature, peak, low, high).to(tl.float64)
    near = heavy_enough(row, count, temperature, peak, share, low * 0 + OUT + 1, low * 0 + 1, low, mean, True)
    first = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    last = tl.full((BLOCK,), LOWEST, tl.int32)
    for start in range(0, count, BLOCK):
        x = scaled(row, start + tl.arange(0, BLOCK), count, temperature)
        kept = rank_of(x, peak, low, mean, True) >= near
        first = tl.minimum(first, tl.where(kept, ordered(x), 0x7FFFFFFF))
        last = tl.maximum(last, tl.where(kept, ordered(x), LOWEST))
    return tl.min(first, 0).to(tl.int64), tl.max(last, 0).to(tl.int64) + 1


@triton.jit
def mean_distance(row, count, temperature, peak, low):
    """From the peak, of the numbers whose key is at least low, by their weights; fp64, and summed as whole numbers."""
    moments, total = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    for start in range(0, count, BLOCK):
        x = scaled(row, start + tl.arange(0, BLOCK), count, temperature)
        distance = peak.to(tl.float64) - x.to(tl.float64)
        there = (ordered(x) >= low) & (distance < float("inf"))
        distance = tl.where(there, distance, 0.0)
        weight = tl.where(there, tl.exp(-distance), 0.0)
        moments += (weight * distance * UNITS).to(tl.int64)
        total += (weight * UNITS).to(tl.int64)
    return tl.sum(moments, 0).to(tl.float64) / tl.sum(total, 0).to(tl.float64)


def variants() -> list[Variant]:
    types = {
        **dict.fromkeys(("logits", "peaks", "sums", "values"), "*fp32:16"),
        **dict.fromkeys(("counts", "places", "ids"), "*i32:16"),
        **dict.fromkeys(("totals", "out"), "*i64:16"),
        "settings": "*fp64:16",
        **dict.fromkeys(("stride", "vocab"), "i32"),
    }
    large = [Variant(choose_kernel, {**types, "chunks": "i32"}, {"WIDTH": w}, CHOICE_WARPS) for w in (128, 32)]
    return [*large, Variant(choose_kernel, types, {"chunks": 1, "WIDTH": 1}, CHOICE_WARPS)]
