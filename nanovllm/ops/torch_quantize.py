"""Weights that are quantised while they are loaded: their scales are searched for.

Native kernels (csrc/quantize.cpp) find the same bits: here too each product and sum is rounded by itself, sums have one
order, and what is divided by is no constant, for which GPUs would multiply.
"""

from __future__ import annotations

import torch

from nanovllm.ops.formats import Q4, Q8_FINE, Codes, Format
from nanovllm.ops.pieces import row_pieces, weights_of_piece

_CUTS = ((0.0, 0.0), (0.03, 0.0), (0.0, 0.03), (0.03, 0.03))
"""Shares of a range that are left out below and above; more of them gain little."""
_TRIED = (-1, 1, 2, 3, 4, 5, 6, 7, 8)
"""Multiples beside the least one that cuts nothing off. -1, 1 and 2 alone have a fifth more of squared error."""
_OUTER = 256  # columns that a unit is stored for; formats.py
_Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def quantize(weight: torch.Tensor, form: Format) -> Codes:
    """weight: [rows, cols] of any float dtype, of which no more than a piece is there in fp32. form: Q4 or Q8_FINE."""
    search = {Q4: search_int4, Q8_FINE: search_int8}[form]
    pieces = row_pieces(len(weight), weight.shape[1], weights_of_piece(weight.device))
    found = [search(_in_groups(weight[rows], form.group)) for rows in pieces]
    codes, scales, halves = (torch.cat(parts) for parts in zip(*found, strict=True))
    return found_codes(form, codes[:, : weight.shape[1]], scales, halves)


def found_codes(form: Format, codes: torch.Tensor, scales: torch.Tensor, halves: torch.Tensor) -> Codes:
    """halves: fp16, least values [rows, groups], or units [rows, 1] that a row's scales are multiples of."""
    if form.least:
        return Codes(form, codes, scales, halves)
    return Codes(form, codes, scales, outer=halves.expand(-1, -(-codes.shape[1] // _OUTER)))


def search_int4(x: torch.Tensor) -> _Found:
    """Groups [columns, rows, groups] in fp32 -> codes [rows, cols], scales and least values.

    The range of a group is cut a little here and there, a line is fitted to what then gets each code (ordinary least
    squares), and the cut with the smallest squared error is kept."""
    low, high = x.amin(dim=0) + 0.0, x.amax(dim=0) + 0.0  # no -0: which zero is taken would not be certain
    span, total = high - low, _sum(x)
    scales, least = (span * (1 / 15)).half(), low.half()
    error = _error_4(x, scales, least)
    for below, above in _CUTS:
        width = span * (1 - below - above)
        codes = _codes_4(x, width * (1 / 15), low + span * below)
        found_scales, found_least = _fitted(x, total, codes)
        found_error = _error_4(x, found_scales, found_least)
        better = found_error < error
        scales, least = scales.where(~better, found_scales), least.where(~better, found_least)
        error = error.where(~better, found_error)
    return _in_rows(_codes_4(x, scales.float(), least.float())), scales, least


def search_int8(x: torch.Tensor) -> _Found:
    """Groups [columns, rows, groups] in fp32 -> codes [rows, cols], scales, and what a row's are multiples of.

    A weight is rounded twice, to a code and then to bfloat16, which has fewer digits than code times scale. So each
    scale is searched for: of a few multiples that is kept whose weights, rounded both times, have the smallest squared
    error."""
    wanted = x.abs().amax(dim=0) * (1 / 127)
    units = _half_above(wanted.amax(dim=-1, keepdim=True) * (1 / 127))
    unit = units.float()
    least = (wanted / unit).ceil_().clamp_(1, 127)
    best, error = least, _error_8(x, least * unit)
    for more in _TRIED:
        scales = (least + more).clamp_(1, 127)
        found = _error_8(x, scales * unit)
        stays = error <= found
        best, error = best.where(stays, scales), error.where(stays, found)
    return _in_rows(_codes_8(x, best * unit)), best.to(torch.int8), units


def _codes_4(x: torch.Tensor, scales: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """The nearest ones, in floats."""
    inverse = torch.where(scales > 1e-30, 1 / scales, 0.0)
    return ((x - least) * inverse).round_().clamp_(0, 15)


def _fitted(x: torch.Tensor, total: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The line through (code, weight) with the least squared error, in half precision; flat where all codes are the
    same. total: the sum of x."""
    count, of_codes = len(x), _sum(codes)
    variance = _sum(codes.square()) * count - of_codes.square()
    covariance = _sum(codes * x) * count - of_codes * total
    scales = torch.where(variance > 0, covariance / variance, 0.0).clamp_(min=0)
    return scales.half(), ((total - scales * of_codes) * (1 / count)).half()


def _error_4(x: torch.Tensor, scales: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Squared, [rows, groups], of codes that are chosen for these two numbers."""
    scale, start = scales.float(), least.float()
    return _sum(_codes_4(x, scale, start).mul_(scale).add_(start).sub_(x).square_())


def _half_above(x: torch.Tensor) -> torch.Tensor:
    """Half-precision numbers that are no smaller, and never 0."""
    return (x * (1 + 2**-10) + 2**-24).half()


def _codes_8(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The nearest ones, in floats."""
    return (x * (1 / scales)).round_().clamp_(-128, 127)


def _error_8(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Squared, [rows, groups]."""
    return _sum(_codes_8(x, scales).mul_(scales).bfloat16().sub(x).square_())


def _sum(x: torch.Tensor) -> torch.Tensor:
    """Over the columns of a group, as a tree: the first half's are added to their partners in the second, and so on."""
    while len(x) > 1:
        first, second = x.chunk(2)
        x = first + second
    return x[0]


def _in_groups(weight: torch.Tensor, group: int) -> torch.Tensor:
    """[rows, cols] -> [group, rows, groups] in fp32, so that what is done to groups is done to neighbours. The last
    group is filled up with its last number, which widens no range."""
    rows, cols = weight.shape
    if padding := -cols % group:
        weight = torch.cat([weight, weight[:, -1:].expand(-1, padding)], dim=1)
    return weight.view(rows, -1, group).permute(2, 0, 1).float().contiguous()


def _in_rows(codes: torch.Tensor) -> torch.Tensor:
    """[group, rows, groups] -> int8 [rows, cols]."""
    return codes.to(torch.int8).permute(1, 2, 0).flatten(1)
