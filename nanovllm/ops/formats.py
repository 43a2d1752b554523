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

    bits: of a code: 8 are signed, 6 are -32 to 31, 5 are 0 to 31, 4 are 0 to 15. group: columns that share a scale.
    scale: dtype of scales and least values; int8 are multiples of fp16 numbers that 256 columns share. least: whether
    there are least values, else they are 0. e4m3: whether codes are float8 numbers (torch.float8_e4m3fn) without NaN
    instead.
    """

    number: int
    bits: int
    group: int
    scale: torch.dtype
    least: bool
    e4m3: bool = False

    def packed_bytes(self, rows: int, cols: int) -> int:
        """Of a weight [rows, cols] as csrc/formats.h has it."""
        values = self.scale.itemsize * (1 + self.least)
        pair = -(-cols // self.group) * _PAIR * (values + self.group * self.bits // 8)
        if self.scale == torch.int8:
            pair += -(-cols // _OUTER) * _PAIR * 2 * (1 + self.least)
        return -(-rows // _PAIR) * pair


Q4 = Format(2, 4, 32, torch.float16, least=True)
Q8 = Format(3, 8, 32, torch.float16, least=False)
Q5 = Format(4, 5, 32, torch.float16, least=True)
Q4_NESTED = Format(5, 4, 32, torch.int8, least=True)
Q5_NESTED = Format(6, 5, 32, torch.int8, least=True)
Q8_FINE = Format(7, 8, 8, torch.int8, least=False)
Q6_FINE = Format(8, 6, 16, torch.int8, least=False)
Q4_32 = Format(9, 4, 32, torch.float32, least=True)
Q4_64 = Format(10, 4, 64, torch.float32, least=True)
Q4_128 = Format(11, 4, 128, torch.float32, least=True)
Q8_128 = Format(12, 8, 128, torch.float32, least=False)
Q8_LEAST_32 = Format(13, 8, 32, torch.float32, least=True)
Q8_LEAST_128 = Format(14, 8, 128, torch.float32, least=True)
E4M3_128 = Format(15, 8, 128, torch.float32, least=False, e4m3=True)


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantised weight [rows, cols] in plain sight. codes: int8 [rows, cols], of float8 numbers their bytes. scales,
    least: [rows, groups]; where both are fp32, scales have at most 11 digits, as fp16 and bfloat16 have. outer,
    outer_least: fp16 [rows, ceil(cols / 256)], that nested ones are multiples of."""

    form: Format
    codes: torch.Tensor
    scales: torch.Tensor
    least: torch.Tensor | None = None
    outer: torch.Tensor | None = None
    outer_least: torch.Tensor | None = None

    def to(self, device: torch.device) -> Codes:
        others = (None if x is None else x.to(device) for x in (self.least, self.outer, self.outer_least))
        return Codes(self.form, self.codes.to(device), self.scales.to(device), *others)

    def columns(self, part: slice) -> Codes:
        """Whole groups, of rows that have one outer number."""
        if part == slice(0, self.codes.shape[1]):
            return self
        groups = slice(part.start // self.form.group, -(-part.stop // self.form.group))
        outer = None if self.outer is None else self.outer[:, : -(-(part.stop - part.start) // _OUTER)]
        least = None if self.least is None else self.least[:, groups]
        return Codes(self.form, self.codes[:, part], self.scales[:, groups], least, outer)

    def dequantize(self) -> torch.Tensor:
        """fp32 [rows, cols]: exact but for one rounding, of the sum."""
        codes = self.codes.view(torch.float8_e4m3fn) if self.form.e4m3 else self.codes
        values = codes.float() * self._of_columns(self.scales, self.outer)
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
    another form than others. data: uint8 [bytes], or [experts, bytes] where it is that of a mixture.

    columns: which of the input's columns meets each of the weight's, int32 [cols] or [experts, cols]; None for the one
    in the same place. A weight that tokens are looked up in has none. dtype: of rows that are floats, and what others
    are rounded to.
    """

    data: torch.Tensor
    segments: tuple[Segment, ...]
    columns: torch.Tensor | None = None
    dtype: torch.dtype = torch.bfloat16
