"""Drawing a token for each row of logits, without sorting the vocabulary.

A row is read in chunks by programs of their own: once for its peak, once for its mass, and where it has cuts, once
more for its candidates: the tokens near the peak that hold all that the cuts can keep. One program a row then finds
the cuts' floor among the candidates, and the token (`sampling_choice.py`). A token's mass is exp(logit - peak) as a
whole number of 2^-42, so that sums are exact: no bit of a row depends on how it is divided, nor on other rows. Of
what a draw may take, this drops tokens below 2^-42 of the likeliest one.

What bounds it is reading the logits two or three times; for few rows it is four launches. Not measured yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.sampling_choice import CHOICE_WARPS, choose_kernel
from nanovllm.triton_kernels.sampling_rows import (
    CAPACITY,
    CHUNK,
    SETTINGS,
    WINDOWS,
    edge,
    has_cuts,
    masses,
    peak_of,
    scaled,
    window_of,
)
from nanovllm.triton_kernels.variant import Variant, launch_options

_WARPS, _MASSES_WARPS = 8, 16


@triton.jit(do_not_specialize=["vocab"])
def peaks_kernel(logits, stride, vocab, peaks, places):
    """The largest logit of each chunk, and the first token that has it; [R, chunks]."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    peak, place = tl.max(scaled(logits + row * stride, token, vocab, 1.0), 0, return_indices=True)
    here = row * tl.num_programs(1) + chunk
    tl.store(peaks + here, peak)
    tl.store(places + here, chunk * CHUNK + place)


@triton.jit(do_not_specialize=["vocab"])
def masses_kernel(logits, stride, vocab, settings, peaks, totals, counts, sums, WIDTH: tl.constexpr):
    """A chunk's mass [R, chunks]; and for rows with cuts, tokens and mass of each window in it [R, chunks, WINDOWS]."""
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    settings += row * SETTINGS
    temperature = tl.load(settings).to(tl.float32)
    if temperature > 0:
        peak = tl.div_rn(peak_of(peaks + row * chunks, chunks, WIDTH), temperature)
        x = scaled(logits + row * stride, chunk * CHUNK + tl.arange(0, CHUNK), vocab, temperature)
        weight, mass = masses(x, peak)
        here = row * chunks + chunk
        tl.store(totals + here, tl.sum(mass, 0))
        if has_cuts(settings):
            window = tl.arange(0, WINDOWS)
            near = (peak - x)[None, :] <= edge(window)[:, None]
            tl.store(counts + here * WINDOWS + window, tl.sum(near.to(tl.int32), 1))
            tl.store(sums + here * WINDOWS + window, tl.sum(tl.where(near, weight[None, :], 0.0), 1))


@triton.jit(do_not_specialize=["vocab"])
def candidates_kernel(
    logits, stride, vocab, settings, peaks, totals, counts, sums, values, ids, WIDTH: tl.constexpr
):  # fmt: skip
    """The scaled logits and the tokens of the window that suffices, in the vocabulary's order; [R, CAPACITY]."""
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    settings += row * SETTINGS
    temperature = tl.load(settings).to(tl.float32)
    first = row * chunks
    counts += first * WINDOWS
    if (temperature > 0) & has_cuts(settings):
        window, _ = window_of(settings, counts, sums + first * WINDOWS, totals + first, chunks, WIDTH)
        if window < WINDOWS:
            earlier = tl.arange(0, WIDTH)
            before = tl.sum(tl.load(counts + earlier * WINDOWS + window, earlier < chunk, 0), 0)
            peak = tl.div_rn(peak_of(peaks + first, chunks, WIDTH), temperature)
            token = chunk * CHUNK + tl.arange(0, CHUNK)
            x = scaled(logits + row * stride, token, vocab, temperature)
            near = peak - x <= edge(window)
            place = row * CAPACITY + before + tl.cumsum(near.to(tl.int32), 0) - 1
            tl.store(values + place, x, near)
            tl.store(ids + place, token, near)


def draw(logits: torch.Tensor, settings: torch.Tensor, *, cuts: bool) -> torch.Tensor:
    """Tokens int64 [R] of fp32 logits [R, V].

    settings: float64 [R, 6]: temperature (0: the first of the largest), top_k (0: all), top_p, min_p, typical_p,
        uniform.
    cuts: whether any row has one.
    """
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    (rows, vocab), device = logits.shape, logits.device
    chunks = triton.cdiv(vocab, CHUNK.value)
    sizes = {"WIDTH": triton.next_power_of_2(chunks)}

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=device)

    out = empty(dtype=torch.int64)
    if not rows:
        return out
    peaks, places = empty(chunks, dtype=torch.float32), empty(chunks, dtype=torch.int32)
    totals = empty(chunks, dtype=torch.int64)
    counts, sums = (empty(chunks * WINDOWS.value, dtype=dtype) for dtype in (torch.int32, torch.float32))
    values, ids = (empty(CAPACITY.value if cuts else 0, dtype=dtype) for dtype in (torch.float32, torch.int32))
    row, options = (logits, logits.stride(0), vocab), launch_options(_WARPS)
    found = settings, peaks, totals, counts, sums
    peaks_kernel[rows, chunks](*row, peaks, places, **options)
    masses_kernel[rows, chunks](*row, *found, **sizes, **launch_options(_MASSES_WARPS))
    if cuts:
        candidates_kernel[rows, chunks](*row, *found, values, ids, **sizes, **options)
    choose_kernel[rows,](*row, *found, places, values, ids, out, chunks, **sizes, **launch_options(CHOICE_WARPS))
    return out


def variants() -> list[Variant]:
    types = {
        **dict.fromkeys(("logits", "peaks", "sums", "values"), "*fp32:16"),
        **dict.fromkeys(("counts", "places", "ids"), "*i32:16"),
        "totals": "*i64:16",
        "settings": "*fp64:16",
        **dict.fromkeys(("stride", "vocab"), "i32"),
    }
    found = []
    for kernel, warps in ((masses_kernel, _MASSES_WARPS), (candidates_kernel, _WARPS), (peaks_kernel, _WARPS)):
        mine = {name: kind for name, kind in types.items() if name in kernel.arg_names}
        for width in (128, 32, 1) if "WIDTH" in kernel.arg_names else (None,):
            found.append(Variant(kernel, mine, {} if width is None else {"WIDTH": width}, warps))
    return found
