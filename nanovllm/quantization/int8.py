"""int8: a signed byte for each weight; 8 columns of a row share a scale, a whole multiple of a number of the row's.

A weight is rounded twice, to a code and then to bfloat16, which has fewer digits than code times scale. So each scale
is searched for: of a few multiples that is kept whose weights, rounded both times, have the smallest squared error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.ops.formats import Q8_FINE, Codes, Format
from nanovllm.quantization.blocks import Blocks
from nanovllm.quantization.pieces import in_groups, row_pieces, weights_of_piece

_GROUP = Q8_FINE.group
_TRIED = (-1, 1, 2)  # beside the least multiple that cuts nothing off; more of them gain little
_UNITS = 256  # columns that a unit is stored for


@dataclass(frozen=True)
class Int8Blocks(Blocks):
    """codes: int8 [rows, cols]. scales: int8 [rows, groups], 1 to 127. units: fp16 [rows], what they are multiples
    of."""

    codes: torch.Tensor
    scales: torch.Tensor
    units: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def form(self) -> Format:
        return Q8_FINE

    @property
    def group(self) -> int:
        return _GROUP

    def __getitem__(self, rows: slice | torch.Tensor) -> Int8Blocks:
        return Int8Blocks(self.codes[rows], self.scales[rows], self.units[rows])

    def columns(self, part: slice) -> Int8Blocks:
        groups = slice(part.start // _GROUP, -(-part.stop // _GROUP))
        return Int8Blocks(self.codes[:, part], self.scales[:, groups], self.units)

    def unpack(self) -> Codes:
        outer = self.units[:, None].expand(-1, -(-self.shape[1] // _UNITS))
        return Codes(Q8_FINE, self.codes, self.scales, outer=outer)


def quantize_int8(weight: torch.Tensor) -> Int8Blocks:
    """weight: [rows, cols] of any float dtype."""
    pieces = row_pieces(len(weight), weight.shape[1], weights_of_piece(weight.device))
    found = [_quantize(in_groups(weight[rows], _GROUP)) for rows in pieces]
    codes, scales, units = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Int8Blocks(codes[:, : weight.shape[1]], scales, units)


def _quantize(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[rows, groups, 8] in fp32 -> codes [rows, cols], scales and units."""
    wanted = groups.abs().amax(dim=-1) / 127
    units = _half_above(wanted.amax(dim=-1) / 127)
    unit = units.float()[:, None]
    least = (wanted / unit).ceil_().clamp_(1, 127)
    best, error = least, _error(groups, least * unit)
    for more in _TRIED:
        scales = (least + more).clamp_(1, 127)
        found = _error(groups, scales * unit)
        best, error = best.where(error <= found, scales), error.minimum(found)
    codes = _codes(groups, best * unit)
    return codes.to(torch.int8).flatten(1), best.to(torch.int8), units


def _half_above(x: torch.Tensor) -> torch.Tensor:
    """Half-precision numbers that are no smaller, and never 0."""
    return (x * (1 + 2**-10) + 2**-24).half()


def _codes(groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The nearest ones, in floats."""
    return (groups * (1 / scales)[..., None]).round_().clamp_(-128, 127)


def _error(groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Squared, [rows, groups]."""
    return _codes(groups, scales).mul_(scales[..., None]).bfloat16().sub(groups).square_().sum(dim=-1)
