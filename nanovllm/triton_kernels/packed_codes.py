"""Quantised weights as GPUs read them: their layout, and the widening of a part of it in registers.

Rows lie in pairs of panels of 16, as in csrc/formats.h; where gated, a pair is a panel of the gate and one of the other
half. A pair is a stream of chunks, 256 columns of codes of 4 bits or 128 of 8 bits, and a program reads its pairs from
one end to the other. A chunk is words of 32 bits: codes [32 rows][32], then scales [words of scales][32 rows].

Word w of a row's codes has, from its low end on, the codes of columns w, w + 32, w + 64, ... of the chunk. So shifting
a tile of words makes 32 columns that follow each other, and no number changes its thread: each such part is an operand
of a product of its own. Scales are of the groups in their order, each before its least value; then, where they are
nested, the word of the two numbers that they are multiples of.

Every load is of words: Triton fetches nothing smaller ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

PAIR = 32  # rows
WORDS = 32  # of a chunk's codes, in each row


@dataclass(frozen=True, slots=True)
class CodeLayout:
    """weight = code * scale + least, in fp32, rounded to what is multiplied.

    bits: of a code, 4 (from 0 on) or 8 (signed). group: columns that share a scale. scale: bits of scales and least
    values, which are floats; those of 8 bits are signed multiples of two fp16 numbers a chunk. least: whether there are
    least values. e4m3: whether codes are float8 numbers instead.
    """

    bits: int
    group: int
    scale: int
    least: bool
    e4m3: bool = False

    @property
    def chunk(self) -> int:
        """Columns."""
        return WORDS * 32 // self.bits

    @property
    def group_bytes(self) -> int:
        """Of a group's scale and least value."""
        return self.scale // 8 * (1 + self.least)

    @property
    def words(self) -> int:
        """Of a row of a chunk."""
        return WORDS + self.chunk // self.group * self.group_bytes // 4 + (self.scale == 8)

    def packed_bytes(self, rows: int, cols: int) -> int:
        return -(-rows // PAIR) * -(-cols // self.chunk) * self.words * PAIR * 4

    def constants(self) -> dict[str, int | bool]:
        """Of every kernel that reads such a weight."""
        return {
            "BITS": self.bits,
            "GROUP": self.group,
            "SCALE": self.scale,
            "LEAST": self.least,
            "E4M3": self.e4m3,
        }


# all that quantised weights lie in: of each form in ops/formats.py
LAYOUTS = (
    *(CodeLayout(4, 32, scale, least=True) for scale in (8, 16, 32)),
    *(CodeLayout(4, group, 32, least=True) for group in (64, 128)),
    *(CodeLayout(8, group, 8, least=False) for group in (8, 16)),
    *(CodeLayout(8, 32, scale, least=True) for scale in (8, 16, 32)),
    CodeLayout(8, 32, 16, least=False),
    *(CodeLayout(8, 128, 32, least) for least in (False, True)),
    CodeLayout(8, 128, 32, least=False, e4m3=True),
)


class PackedCodes(NamedTuple):
    """data: int32 [words], or [experts, words]. columns: which of the input's columns meets each of the weight's, int32
    [experts, cols]; None for the one in the same place."""

    data: torch.Tensor
    layout: CodeLayout
    columns: torch.Tensor | None = None


@triton.constexpr_function
def chunk_columns(BITS):
    return 1024 // BITS


@triton.constexpr_function
def chunk_words(BITS, GROUP, SCALE, LEAST):
    """Of the 32 rows of a pair."""
    return 32 * (32 + 1024 // BITS // GROUP * SCALE * (1 + LEAST) // 32 + (SCALE == 8))


@triton.jit
def _number(places, there, BIT: tl.constexpr, SCALE: tl.constexpr):
    """That which begins at this bit of a chunk's scales, fp32. places: of the first word of each row [R]."""
    word = tl.load(places + BIT // 32 * 32, there, 0)
    if SCALE == 32:
        value = word.to(tl.float32, bitcast=True)
    elif SCALE == 8:
        value = ((word << (24 - BIT % 32)) >> 24).to(tl.float32)
    else:
        value = ((word >> (BIT % 32)) & 65535).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _of_group(
    places,
    there,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Scale and least value of a chunk's group, fp32 [R]."""
    EACH: tl.constexpr = SCALE * (1 + LEAST)
    OUTER: tl.constexpr = 1024 // BITS // GROUP * EACH
    scale = _number(places, there, INDEX * EACH, SCALE)
    least = tl.zeros_like(scale)
    if SCALE == 8:
        scale *= _number(places, there, OUTER, 16)
    if LEAST:
        least = _number(places, there, INDEX * EACH + SCALE, SCALE)
        if SCALE == 8:
            least *= _number(places, there, OUTER + 16, 16)
    return scale, least


@triton.jit
def widened(
    words,  # [R, 32] of codes
    places,  # [R] of the first word of each row's scales
    there,  # [R]
    PART: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    LEAST: tl.constexpr,
    E4M3: tl.constexpr,
):
    """Columns PART * 32 to PART * 32 + 31 of a chunk: fp32 [R, 32], to be rounded."""
    scale, least = _of_group(places, there, PART * 32 // GROUP, BITS, GROUP, SCALE, LEAST)
    if BITS == 4:
        SHIFTED: tl.constexpr = 16 ** (PART % 4)  # codes stay where they are, as scales are fewer
        code = ((words >> (PART // 4 * 16)) & (15 * SHIFTED)).to(tl.float32)
        scale *= 1.0 / SHIFTED
    elif E4M3:
        # the bits of an fp32 number that is smaller by 2 ** 120, as exponents have another middle there
        bits = ((words << (24 - 8 * PART)) >> 4) & -0x78100000  # sign, and 7 bits behind 4 of the exponent
        code = bits.to(tl.float32, bitcast=True)
        scale *= 1.329227995784916e36
    else:
        code = ((words << (24 - 8 * PART)) >> 24).to(tl.float32)
    scale, least = scale[:, None], least[:, None]
    for i in tl.static_range(1, 32 // GROUP):  # groups of 16 and 8, which have no least values
        another, _ = _of_group(places, there, PART * (32 // GROUP) + i, BITS, GROUP, SCALE, LEAST)
        scale = tl.where((tl.arange(0, 32) < i * GROUP)[None, :], scale, another[:, None])
    value = code * scale  # exact in all forms with least values
    if LEAST:
        value += least
    return value
