"""Searched: a weight that is quantised when it is packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nanovllm.ops.base import Ops
from nanovllm.ops.formats import Codes, Format
from nanovllm.ops.pieces import row_pieces
from nanovllm.quantization.blocks import Blocks

_PIECE = 1 << 22  # weights that are quantised together: threads share them


@dataclass(frozen=True)
class Searched(Blocks):
    """weight: [rows, cols], floats or blocks of another form, of which a piece at a time is widened and quantised.
    kept: the columns that these are, of rows whose scales are those of the whole."""

    ops: Ops
    wanted: Format
    weight: torch.Tensor | Blocks
    kept: slice

    @classmethod
    def whole(cls, ops: Ops, form: Format, weight: torch.Tensor | Blocks) -> Searched:
        return cls(ops, form, weight, slice(0, weight.shape[1]))

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.kept.stop - self.kept.start

    @property
    def form(self) -> Format:
        return self.wanted

    @property
    def group(self) -> int:
        return self.wanted.group

    def __getitem__(self, rows: slice | torch.Tensor) -> Searched:
        return dataclasses.replace(self, weight=self.weight[rows])

    def columns(self, part: slice) -> Searched:
        first = self.kept.start
        return dataclasses.replace(self, kept=slice(first + part.start, first + part.stop))

    def to(self, device: torch.device) -> Searched:
        return dataclasses.replace(self, weight=self.weight.to(device))

    def pieces(self) -> Iterator[tuple[int, Codes]]:
        for rows in row_pieces(len(self), self.weight.shape[1], _PIECE):
            yield rows.start, self[rows].unpack()

    def unpack(self) -> Codes:
        floats = self.weight.dequantize() if isinstance(self.weight, Blocks) else self.weight
        return self.ops.quantize(floats, self.wanted).columns(self.kept)
