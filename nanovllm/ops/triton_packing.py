"""Quantised weights in the layout of triton_kernels/packed_codes.py, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanovllm.errors import WeightError
from nanovllm.ops.formats import Codes, Format, Packed, Segment
from nanovllm.triton_kernels.packed_codes import PAIR, WORDS, CodeLayout, PackedCodes
from nanovllm.triton_kernels.quantized_rows import dequantize

_PANEL = PAIR // 2
_MOST_SCALE = 256  # 2 ** 120 times as much would be infinite; packed_codes.py
_OUTER = 256  # columns that share what nested scales are multiples of; formats.py


def layout_of(form: Format) -> CodeLayout:
    """Codes of 5 and 6 bits lie in bytes."""
    return CodeLayout(4 if form.bits == 4 else 8, form.group, form.scale.itemsize * 8, form.least, form.e4m3)


def codes_of(packed: Packed, segment: Segment) -> PackedCodes | None:
    """As kernels take them; None where the segment's rows are floats."""
    if segment.form is None:
        return None
    data = packed.data if len(packed.segments) == 1 else packed.data[segment.start :]
    return PackedCodes(data.view(torch.int32), layout_of(segment.form), packed.columns)


def floats_of(packed: Packed, segment: Segment, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that are floats [N, cols], or those of experts [E, N, cols]."""
    rows = segment.rows.stop - segment.rows.start
    end = segment.start + rows * cols * dtype.itemsize
    return packed.data[..., segment.start : end].view(dtype).unflatten(-1, (rows, cols))


def widened(packed: Packed, shape: tuple[int, int], dtype: torch.dtype, *, gated: bool) -> torch.Tensor:
    """The whole weight of this shape, in memory of its own where some of it is quantised."""
    if all(segment.form is None for segment in packed.segments):
        (segment,) = packed.segments
        return floats_of(packed, segment, shape[1], dtype)
    whole = torch.empty(shape, dtype=dtype, device=packed.data.device)
    for segment in packed.segments:
        codes, place = codes_of(packed, segment), whole[segment.rows]
        if codes is None:
            place.copy_(floats_of(packed, segment, shape[1], dtype))
        else:
            dequantize(codes, place, gated=gated)
    return whole


def pack_codes(codes: Codes, first: int, out: torch.Tensor, half: int | None) -> None:
    """As `Ops.pack_codes`. WeightError for float8 with scales that kernels cannot multiply by."""
    if codes.form.e4m3 and codes.scales.abs().max() >= _MOST_SCALE:
        raise WeightError(f"float8 weights with scales of {_MOST_SCALE} and more: set quantization='dequantize'")
    codes, layout, (rows, cols) = codes.to(out.device), layout_of(codes.form), codes.codes.shape
    chunks = -(-cols // layout.chunk)
    place = first + torch.arange(rows, device=out.device)
    if half is not None:
        place = place // _PANEL * PAIR + half * _PANEL + place % _PANEL
    pair, inside = place // PAIR, place % PAIR
    memory = out.view(torch.int32).view(-1, chunks, layout.words, PAIR)
    memory[:, :, :WORDS][pair, :, inside] = _code_words(codes.codes, layout, chunks)
    memory[:, :, WORDS:][pair, :, :, inside] = _scale_words(codes, layout, chunks)


def _code_words(codes: torch.Tensor, layout: CodeLayout, chunks: int) -> torch.Tensor:
    """int32 [rows, chunks, words]."""
    rows, cols = codes.shape
    padded = F.pad(codes, (0, chunks * layout.chunk - cols))
    parts = padded.view(rows, chunks, -1, WORDS).transpose(2, 3)  # codes of a word beside each other
    if layout.bits == 4:
        parts = parts[..., ::2] | parts[..., 1::2] << 4
    return parts.contiguous().view(torch.int32).squeeze(-1)


def _scale_words(codes: Codes, layout: CodeLayout, chunks: int) -> torch.Tensor:
    """int32 [rows, chunks, words]."""
    inner = _bytes(codes.scales, codes.least)
    size = layout.chunk // layout.group * layout.group_bytes
    words = F.pad(inner, (0, chunks * size - inner.shape[1])).view(torch.int32).view(len(inner), chunks, -1)
    if codes.outer is None:
        return words
    least = torch.zeros_like(codes.outer) if codes.outer_least is None else codes.outer_least
    outer = _bytes(codes.outer, least).view(torch.int32)
    of_chunks = outer.repeat_interleave(_OUTER // layout.chunk, dim=1)[:, :chunks]
    return torch.cat([words, of_chunks[..., None]], dim=2)


def _bytes(values: torch.Tensor, others: torch.Tensor | None) -> torch.Tensor:
    """uint8 [rows, bytes] of a number of each group, or of two beside each other."""
    both = values[..., None] if others is None else torch.stack([values, others], dim=-1)
    return both.contiguous().view(torch.uint8).flatten(1)
