"""GGMLBlocks: a quantised matrix as bytes, row by row, as GGUF files have it.

The types are ggml's: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nanovllm.ops.formats import Q4, Q4_NESTED, Q5, Q5_NESTED, Q6_FINE, Q8, Codes, Format
from nanovllm.ops.pieces import row_pieces, weights_of_piece
from nanovllm.quantization.blocks import Blocks


class Kind(NamedTuple):
    """cols, bytes: of a block. form: what kernels get. unpack: from blocks [B, bytes] to codes [B, cols], scales [B,
    groups of a block] and whatever else Codes has."""

    cols: int
    bytes: int
    form: Format
    unpack: Callable[[torch.Tensor], tuple[torch.Tensor | None, ...]]


@dataclass(frozen=True)
class GGMLBlocks(Blocks):
    """kind: a name of KINDS. data: uint8 [rows, bytes of a row], on any device."""

    kind: str
    data: torch.Tensor
    cols: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.cols

    @property
    def form(self) -> Format:
        return KINDS[self.kind].form

    @property
    def group(self) -> int:
        return KINDS[self.kind].cols

    def __getitem__(self, rows: slice | torch.Tensor) -> GGMLBlocks:
        return GGMLBlocks(self.kind, self.data[rows], self.cols)

    def columns(self, part: slice) -> GGMLBlocks:
        count = part.stop - part.start
        if count == self.cols:
            return self
        cols, size = KINDS[self.kind][:2]
        assert part.start % cols == 0 and count % cols == 0
        return GGMLBlocks(self.kind, self.data[:, part.start // cols * size : part.stop // cols * size], count)

    def to(self, device: torch.device) -> GGMLBlocks:
        return GGMLBlocks(self.kind, self.data.to(device), self.cols)

    def pieces(self) -> Iterator[tuple[int, Codes]]:
        for rows in row_pieces(*self.shape, weights_of_piece(self.data.device)):
            yield rows.start, self[rows].unpack()

    def unpack(self) -> Codes:
        rows = len(self)
        kind = KINDS[self.kind]
        codes, *values = kind.unpack(self.data.reshape(-1, kind.bytes))
        of_rows = [None if v is None else v.reshape(rows, -1) for v in values]
        assert codes is not None and of_rows[0] is not None
        return Codes(kind.form, codes.reshape(rows, -1)[:, : self.cols], of_rows[0], *of_rows[1:])


def row_bytes(kind: str, cols: int) -> int:
    """Of a row; the last block of ours may be short of columns."""
    return -(-cols // KINDS[kind].cols) * KINDS[kind].bytes


# --- ggml's types ------------------------------------------------------------------------------------


def _half(data: torch.Tensor) -> torch.Tensor:
    return data.contiguous().view(torch.float16)


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [..., 2 n]: all low halves, then all high ones."""
    return torch.cat([data & 15, data >> 4], dim=-1)


def _bits(data: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [..., 8 n], the lowest bit first."""
    return (data[..., None] >> torch.arange(8, dtype=torch.uint8, device=data.device) & 1).flatten(-2)


def _q4_0(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scales = _half(b[:, :2])
    return _nibbles(b[:, 2:]), scales, scales * -8  # exact


def _q4_1(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _nibbles(b[:, 4:]), _half(b[:, :2]), _half(b[:, 2:4])


def _q5_0(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scales = _half(b[:, :2])
    return _nibbles(b[:, 6:]) | _bits(b[:, 2:6]) << 4, scales, scales * -16  # exact


def _q5_1(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _nibbles(b[:, 8:]) | _bits(b[:, 4:8]) << 4, _half(b[:, :2]), _half(b[:, 2:4])


def _q8_0(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    return b[:, 2:].contiguous().view(torch.int8), _half(b[:, :2]), None


def _k_scales(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of Q4_K and Q5_K: scales and least values of eight groups, 6 bits each in 12 bytes, and the block's two."""
    first, second, rest = b[:, 4:16].chunk(3, dim=1)
    scales = torch.cat([first & 63, rest & 15 | first >> 6 << 4], dim=1)
    least = torch.cat([second & 63, rest >> 4 | second >> 6 << 4], dim=1)
    return scales.view(torch.int8), least.view(torch.int8), _half(b[:, :2]), -_half(b[:, 2:4])


def _q4_k(b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _nibbles(b[:, 16:].unflatten(1, (4, 32))).flatten(1), *_k_scales(b)


def _q5_k(b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    low = _nibbles(b[:, 48:].unflatten(1, (4, 32))).unflatten(-1, (2, 32)).flatten(1, 2)  # [B, 8, 32]
    high = b[:, 16:48, None] >> torch.arange(8, dtype=torch.uint8, device=b.device) & 1  # [B, 32, 8]
    return (low | high.transpose(1, 2) << 4).flatten(1), *_k_scales(b)


def _q6_k(b: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    low = _nibbles(b[:, :128].unflatten(1, (2, 64))).unflatten(-1, (4, 32))  # [B, 2, 4, 32]
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=b.device)
    pairs = b[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts[:, None] & 3
    codes = (low | pairs << 4).flatten(1).view(torch.int8) - 32
    return codes, b[:, 192:208].contiguous().view(torch.int8), None, _half(b[:, 208:])


KINDS = {
    "Q4_0": Kind(32, 18, Q4, _q4_0),
    "Q4_1": Kind(32, 20, Q4, _q4_1),
    "Q5_0": Kind(32, 22, Q5, _q5_0),
    "Q5_1": Kind(32, 24, Q5, _q5_1),
    "Q8_0": Kind(32, 34, Q8, _q8_0),
    "Q4_K": Kind(256, 144, Q4_NESTED, _q4_k),
    "Q5_K": Kind(256, 176, Q5_NESTED, _q5_k),
    "Q6_K": Kind(256, 210, Q6_FINE, _q6_k),
}
"""Types that kernels compute with; values are exactly the type's own."""
