"""int4: four bits for each weight; 32 columns of a row share a scale and a least value, in half precision.

That is ggml's Q4_1. The two numbers are searched for: the range of a group is cut a little here and there, a line is
fitted to what then gets each code (ordinary least squares), and the cut with the smallest squared error is kept.
"""

from __future__ import annotations

import torch

from nanovllm.ops.formats import Q4
from nanovllm.quantization.ggml import GGMLBlocks, q4_1_blocks
from nanovllm.quantization.pieces import in_groups, row_pieces, weights_of_piece

_CUTS = ((0.0, 0.0), (0.03, 0.0), (0.0, 0.03), (0.03, 0.03))
"""Shares of the range that are left out below and above; more of them gain little."""


def quantize_int4(weight: torch.Tensor) -> GGMLBlocks:
    """weight: [rows, cols] of any float dtype."""
    pieces = row_pieces(len(weight), weight.shape[1], weights_of_piece(weight.device))
    found = [_quantize(in_groups(weight[rows], Q4.group)).data for rows in pieces]
    return GGMLBlocks("Q4_1", torch.cat(found), weight.shape[1])


def _quantize(groups: torch.Tensor) -> GGMLBlocks:
    """[rows, groups, 32] in fp32."""
    low, high = groups.aminmax(dim=-1)
    span = high - low
    scales, least = _in_half(span / 15, low)
    error = _error(groups, scales, least)
    for below, above in _CUTS:
        start, width = low + span * below, span * (1 - below - above)
        codes = _codes(groups, width / 15, start)
        found_scales, found_least = _in_half(*_fitted(groups, codes))
        found_error = _error(groups, found_scales, found_least)
        better = found_error < error
        scales, least = scales.where(~better, found_scales), least.where(~better, found_least)
        error = error.minimum(found_error)
    return q4_1_blocks(_codes(groups, scales.float(), least.float()).to(torch.uint8), scales, least)


def _in_half(scales: torch.Tensor, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return scales.half(), least.half()


def _codes(groups: torch.Tensor, scales: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """The nearest ones, in floats."""
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    return ((groups - least[..., None]) * inverse[..., None]).round_().clamp_(0, 15)


def _fitted(groups: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The line through (code, weight) with the least squared error; flat where all codes are the same."""
    code_mean, mean = codes.mean(dim=-1), groups.mean(dim=-1)
    variance = codes.square().mean(dim=-1) - code_mean.square()
    covariance = (codes * groups).mean(dim=-1) - code_mean * mean
    scales = torch.where(variance > 0, covariance / variance, 0.0).clamp_(min=0)
    return scales, mean - scales * code_mean


def _error(groups: torch.Tensor, scales: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Squared, [rows, groups], of codes that are chosen for these two numbers."""
    scale, start = scales.float(), least.float()
    found = _codes(groups, scale, start) * scale[..., None] + start[..., None]
    return (found - groups).square_().sum(dim=-1)
