"""Linear layers compute with the codes of the checkpoint, whatever their type.

Projections that share a matrix may have different types: rows of one type follow each other in the packed weight,
and each such segment is a product of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from nanovllm.errors import WeightError
from nanovllm.ops.base import Ops
from nanovllm.ops.formats import Format, Packed, Segment
from nanovllm.quantization.blocks import Blocks
from nanovllm.quantization.linear_method import LinearWeights, Loaded, Part, Stack, UnquantizedLinearMethod
from nanovllm.quantization.quantized_method import fuses_gate, pack_blocks, packed_memory


class _Run(NamedTuple):
    """Parts of one form that follow each other, and where their bytes are."""

    segment: Segment
    parts: list[Part]
    size: int


class StoredLinearMethod(UnquantizedLinearMethod):
    """Keeps what it is given, blocks or floats, until a layer is complete."""

    takes_blocks = True

    def __init__(self, ops: Ops) -> None:
        super().__init__(ops)
        self.embeds = True

    def create(self, layer: LinearWeights, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> None:
        layer.rows, layer.cols, layer.packed = rows, cols, True
        layer.weight = nn.Parameter(torch.empty(0, dtype=torch.uint8, device=device), requires_grad=False)
        layer.loaded = Loaded(dtype)

    def stack(self, layers: Sequence[LinearWeights]) -> Stack:
        """Its memory is made with the first expert that is finalized: the type is known by then."""
        shared = Stack(torch.empty(0))
        for index, layer in enumerate(layers):
            assert layer.loaded is not None
            layer.loaded = Loaded(layer.loaded.dtype, stack=shared, index=index, layers=len(layers))
        return shared

    def load(self, layer: LinearWeights, tensor: torch.Tensor | Blocks, rows: slice) -> None:
        assert layer.loaded is not None
        layer.loaded.parts.append(Part(rows, tensor))

    def finalize(self, layer: LinearWeights) -> None:
        loaded = layer.loaded
        assert loaded is not None
        parts, order = _in_one_order(layer, loaded.parts)
        runs, device = self._runs(layer, parts, loaded.dtype), layer.weight.device
        segments, size = tuple(run.segment for run in runs), sum(run.size for run in runs)
        columns = None if order is None else order.int().to(device)
        if loaded.stack is None:
            packed = Packed(packed_memory(self._ops, size, device), segments, columns, loaded.dtype)
        else:
            packed = self._shared(loaded, segments, size, columns, device)
        for run in runs:
            self._pack(layer, run, packed.data[run.segment.start : run.segment.start + run.size], loaded.dtype)
        layer.weight = nn.Parameter(packed.data, requires_grad=False)
        layer.quantized, layer.loaded = packed, None

    def num_bytes(self, layer: LinearWeights, device: torch.device) -> None:
        return None

    def _runs(self, layer: LinearWeights, parts: list[Part], dtype: torch.dtype) -> list[_Run]:
        parts = sorted(parts, key=lambda part: part.rows.start)
        if layer.gated and len({_form(part) for part in parts}) > 1:  # whose halves are side by side
            parts = [Part(rows, _floats(tensor)) for rows, tensor in parts]
        runs: list[_Run] = []
        start = 0
        for part in parts:
            together = [part]
            if runs and runs[-1].segment.form == _form(part):
                last = runs.pop()
                together, start = [*last.parts, part], last.segment.start
            # where the vocabulary is padded, nothing is loaded for the last rows
            end = layer.rows if part is parts[-1] else part.rows.stop
            rows, form = slice(together[0].rows.start, end), _form(part)
            size = self._bytes(form, end - rows.start, layer.cols, dtype)
            runs.append(_Run(Segment(rows, form, start), together, size))
            start += runs[-1].size
        return runs

    def _bytes(self, form: Format | None, rows: int, cols: int, dtype: torch.dtype) -> int:
        if form is None:
            return self._ops.packed_numel(rows, cols, dtype) * dtype.itemsize
        return self._ops.codes_bytes(form, rows, cols)

    def _shared(
        self,
        loaded: Loaded,
        segments: tuple[Segment, ...],
        size: int,
        columns: torch.Tensor | None,
        device: torch.device,
    ) -> Packed:
        """This expert's part of the memory of all."""
        stack = loaded.stack
        assert stack is not None
        if isinstance(stack.weight, torch.Tensor):
            memory = packed_memory(self._ops, loaded.layers * size, device)
            of_all = None if columns is None else columns.new_empty(loaded.layers, len(columns))
            stack.weight = Packed(memory.view(loaded.layers, size), segments, of_all, loaded.dtype)
        whole = stack.weight
        if whole.segments != segments or (whole.columns is None) != (columns is None):
            raise WeightError("experts of one layer are quantised in different ways: set quantization='dequantize'")
        mine = None if whole.columns is None else whole.columns[loaded.index]
        if mine is not None and columns is not None:
            mine.copy_(columns)
        return Packed(whole.data[loaded.index], segments, mine, loaded.dtype)

    def _pack(self, layer: LinearWeights, run: _Run, memory: torch.Tensor, dtype: torch.dtype) -> None:
        if memory.device.type == "meta":
            return
        if run.segment.form is None:
            whole = torch.cat([_floats(tensor).to(dtype) for _, tensor in run.parts])
            self._ops.pack(whole, gated=fuses_gate(layer, self._ops), out=memory.view(dtype))
            return
        for rows, tensor in run.parts:
            assert isinstance(tensor, Blocks)
            pack_blocks(self._ops, layer, tensor, rows.start - run.segment.rows.start, memory)


def _in_one_order(layer: LinearWeights, parts: list[Part]) -> tuple[list[Part], torch.Tensor | None]:
    """Parts whose columns are all in the order that is returned, None for that of the matrix: of those that are not,
    the floats are taken."""
    orders = [part.tensor.order() if isinstance(part.tensor, Blocks) else None for part in parts]
    order = next((found for found in orders if found is not None), None)
    if order is None:
        return parts, None
    agree = [found is not None and torch.equal(found, order) for found in orders]
    if layer.gated and not all(agree):  # its halves are side by side, and of one form
        return [Part(rows, _floats(tensor)) for rows, tensor in parts], None
    ordered = [
        part if agrees else Part(part.rows, _floats(part.tensor)[:, order])
        for part, agrees in zip(parts, agree, strict=True)
    ]
    return ordered, order


def _form(part: Part) -> Format | None:
    return part.tensor.form if isinstance(part.tensor, Blocks) else None


def _floats(tensor: torch.Tensor | Blocks) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, Blocks) else tensor
