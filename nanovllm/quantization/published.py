"""Published: a quantised weight that is several tensors of a checkpoint, read when it is unpacked."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from nanovllm.errors import ModelNotSupported, WeightError
from nanovllm.ops.formats import Q4_32, Q4_64, Q4_128, Q8_128, Q8_LEAST_32, Q8_LEAST_128, Codes, Format
from nanovllm.ops.pieces import row_pieces
from nanovllm.quantization.blocks import Blocks
from nanovllm.quantization.raw import Raw

_PIECE = 1 << 20  # weights that are unpacked together


class Grid(NamedTuple):
    """Some rows of a weight, (code - zero) * scale. codes: as in Codes, int8 [rows, cols]. scales: [rows, groups].
    zeros: integers [rows, groups]; None for 0."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Weight(ABC):
    """What a scheme knows of a weight before it reads it.

    parts: {last part of the name: tensor}. shape: [out, in]. span: columns that share a scale; all, where it is as
    many as there are. form: what kernels get. ordered: whether groups' columns lie apart.
    """

    module: str
    parts: Mapping[str, Raw]
    shape: tuple[int, int]
    span: int
    form: Format
    ordered: bool

    @abstractmethod
    def grid(self, tensors: Mapping[str, torch.Tensor], rows: slice) -> Grid:
        """tensors: those of `parts`."""

    def groups(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Of each column, where the checkpoint has them, [in]."""
        return None


class Scheme(Protocol):
    """How a checkpoint is quantised, from its config.json.

    method: as it is called there. companions: last parts of the names of tensors that make up a weight.
    """

    method: str
    companions: frozenset[str]

    def weight(self, module: str, parts: Mapping[str, Raw]) -> Weight | None:
        """parts: the companions that the module has. None if it is not quantised. WeightError for what does not fit
        together, ModelNotSupported for what there is no code for."""
        ...


@dataclass(frozen=True, eq=False)
class Published(Blocks):
    """rows, cols: those of the weight that these are. is_there: whether its tensors can be read; else its sizes alone
    are of use."""

    weight: Weight
    rows: slice | torch.Tensor
    cols: slice
    is_there: bool = True

    @classmethod
    def whole(cls, weight: Weight, *, is_there: bool = True) -> Published:
        rows, cols = weight.shape
        return cls(weight, slice(0, rows), slice(0, cols), is_there)

    @property
    def shape(self) -> tuple[int, int]:
        rows = self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)
        return rows, self.cols.stop - self.cols.start

    @property
    def form(self) -> Format:
        return self.weight.form

    @property
    def group(self) -> int:
        weight = self.weight
        return 1 if weight.ordered or weight.span >= weight.shape[1] else self.form.group

    def __getitem__(self, rows: slice | torch.Tensor) -> Published:
        if isinstance(self.rows, torch.Tensor):
            return dataclasses.replace(self, rows=self.rows[rows])
        if isinstance(rows, torch.Tensor):
            return dataclasses.replace(self, rows=rows + self.rows.start)
        first, end, _ = rows.indices(len(self))
        return dataclasses.replace(self, rows=slice(self.rows.start + first, self.rows.start + end))

    def columns(self, part: slice) -> Published | torch.Tensor:
        if part.stop - part.start == self.shape[1]:
            return self
        if self.weight.ordered:
            return (self.dequantize() if self.is_there else torch.empty(self.shape, device="meta"))[:, part].bfloat16()
        assert part.start % self.group == 0
        return dataclasses.replace(self, cols=slice(self.cols.start + part.start, self.cols.start + part.stop))

    def order(self) -> torch.Tensor | None:
        return self._order(self._tensors()) if self.is_there and self.weight.ordered else None

    def unpack(self) -> Codes:
        tensors = self._tensors()
        return self._codes(tensors, self._order(tensors))

    def pieces(self) -> Iterator[tuple[int, Codes]]:
        tensors = self._tensors()
        order = self._order(tensors)
        for rows in row_pieces(*self.shape, _PIECE):
            yield rows.start, self[rows]._codes(tensors, order)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: raw.load() for name, raw in self.weight.parts.items()}

    def _order(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        weight = self.weight
        groups = weight.groups(tensors)
        expected = torch.arange(weight.shape[1]) // weight.span
        if groups is None or torch.equal(groups, expected):
            return None
        order = groups.argsort(stable=True)
        if not weight.ordered or not torch.equal(groups[order], expected):
            raise WeightError(f"{weight.module}: its columns' groups are not those that config.json tells of")
        return order

    def _codes(self, tensors: Mapping[str, torch.Tensor], order: torch.Tensor | None) -> Codes:
        form, span = self.form, self.weight.span
        codes, scales, zeros = self._grid(tensors)
        codes = codes[:, self.cols] if order is None else codes[:, order]
        of_groups = torch.arange(self.cols.start, self.cols.stop, form.group) // span
        scales = scales[:, of_groups].float()
        if not form.least:
            return Codes(form, codes, scales)
        least = torch.zeros_like(scales) if zeros is None else zeros[:, of_groups].float() * -scales
        return Codes(form, codes, scales, least)

    def _grid(self, tensors: Mapping[str, torch.Tensor]) -> Grid:
        if isinstance(self.rows, slice):
            return self.weight.grid(tensors, self.rows)
        first = int(self.rows.min())
        codes, scales, zeros = self.weight.grid(tensors, slice(first, int(self.rows.max()) + 1))
        mine = self.rows - first
        return Grid(codes[mine], scales[mine], None if zeros is None else zeros[mine])


def integer_form(module: str, bits: int, span: int, cols: int, *, zeros: bool) -> Format:
    """For integers of 4 or 8 bits; ModelNotSupported for groups that there is no form for."""
    of_bytes = (Q8_LEAST_128 if zeros else Q8_128), Q8_LEAST_32
    for form in (Q4_128, Q4_64, Q4_32) if bits == 4 else of_bytes:
        if span >= cols or span % form.group == 0:
            return form
    raise ModelNotSupported(
        f"{module}: groups of {span} columns are not supported; multiples of 32 are, and whole rows"
    )
