"""Blocks: a quantised matrix, whatever file it comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch

from nanovllm.ops.formats import Codes, Format
from nanovllm.ops.pieces import row_pieces


class Blocks(ABC):
    """A matrix [rows, cols] of codes, some columns of a row sharing a scale. What it is of a file is read when it is
    unpacked."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]: ...

    @property
    @abstractmethod
    def form(self) -> Format:
        """What kernels get."""

    @property
    @abstractmethod
    def group(self) -> int:
        """Columns that cannot be parted."""

    @abstractmethod
    def __getitem__(self, rows: slice | torch.Tensor) -> Blocks:
        """Rows of a range, or of these numbers."""

    @abstractmethod
    def columns(self, part: slice) -> Blocks | torch.Tensor:
        """Of whole groups. Floats where the groups' columns do not lie side by side."""

    @abstractmethod
    def unpack(self) -> Codes:
        """Columns are in the order of `order`."""

    def __len__(self) -> int:
        return self.shape[0]

    def order(self) -> torch.Tensor | None:
        """The columns as they are unpacked, int64 [cols]; None if they are as in the matrix."""
        return None

    def to(self, device: torch.device) -> Blocks:
        """What can be unpacked there; else as it is."""
        return self

    def pieces(self) -> Iterator[tuple[int, Codes]]:
        """Some rows at a time, and which is the first of them."""
        for rows in row_pieces(*self.shape):
            yield rows.start, self[rows].unpack()

    def dequantize(self) -> torch.Tensor:
        """fp32 [rows, cols], columns as in the matrix."""
        found, order = torch.empty(self.shape), self.order()
        for start, codes in self.pieces():
            found[start : start + len(codes.codes)] = codes.dequantize()
        return found if order is None else found[:, order.argsort()]
