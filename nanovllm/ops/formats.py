"""The forms of a quantised weight that kernels multiply by; csrc/formats.h has the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

_OUTER = 256  # columns that share what nested scales are multiples of; csrc/formats.h
_PAIR = 32  # rows that lie side by side once packed; csrc/formats.h


@dataclass(frozen=True, slots=True)
class Format:
    """weight = code * scale + least, rounded to bfloat16, or to the dtype that GPUs compute in.

    bits: of a code: 8 are signed, 4 are 0 to 15. group: columns that share a scale. scale: dtype of scales and least
    values; int8 are multiples of fp16 numbers that 256 columns share. least: whether there are least values, else
    they are 0.
    """

    number: int
    bits: int
    group: int
    scale: torch.dtype
    least: bool

    def packed_bytes(self, rows: int, cols: int) -> int:
        """Of a weight [rows, cols] as csrc/formats.h has it."""
        values = self.scale.itemsize * (1 + self.least)
        pair = -(-cols // self.group) * _PAIR * (values + self.group * self.bits // 8)
        if self.scale == torch.int8:
            pair += -(-cols // _OUTER) * _PAIR * 2 * (1 + self.least)
        return -(-rows // _PAIR) * pair


Q4 = Format(2, 4, 32, torch.float16, least=True)
Q8 = Format(3, 8, 32, torch.float16, least=False)
Q8_LEAST = Format(4, 8, 32, torch.float16, least=True)
Q4_NESTED = Format(5, 4, 32, torch.int8, least=True)
Q8_NESTED = Format(6, 8, 32, torch.int8, least=True)
Q8_FINE = Format(7, 8, 16, torch.int8, least=False)


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantised weight [rows, cols] in plain sight. codes: int8 [rows, cols]. scales, least: [rows, groups].
    outer, outer_least: fp16 [rows, ceil(cols / 256)], that nested ones are multiples of."""

    form: Format
    codes: torch.Tensor
    scales: torch.Tensor
    least: torch.Tensor | None = None
    outer: torch.Tensor | None = None
    outer_least: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """fp32 [rows, cols]: exact but for one rounding, of the sum."""
        values = self.codes.float() * self._of_columns(self.scales, self.outer)
        return values if self.least is None else values + self._of_columns(self.least, self.outer_least)

    def _of_columns(self, values: torch.Tensor, outer: torch.Tensor | None) -> torch.Tensor:
        cols = self.codes.shape[1]
        each = values.float().repeat_interleave(self.form.group, dim=1)[:, :cols]
        return each if outer is None else each * outer.float().repeat_interleave(_OUTER, dim=1)[:, :cols]


class Segment(NamedTuple):
    """Rows of a weight that have one form. form: None for floats. start: their first byte."""

    rows: slice
    form: Format | None
    start: int


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantised weight as kernels take it in the place of a packed tensor: bytes, of which some rows may be in
    another form than others.

    data: uint8 [bytes], or [experts, bytes] where it is that of a mixture. dtype: of rows that are floats, and what
    others are rounded to."""

    data: torch.Tensor
    segments: tuple[Segment, ...]
    dtype: torch.dtype = torch.bfloat16
