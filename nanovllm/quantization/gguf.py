"""gguf: linear layers compute with the blocks of the file, whatever their type.

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
from nanovllm.quantization.blocks import KINDS, Blocks
from nanovllm.quantization.linear_method import LinearWeights, Loaded, Part, Stack, UnquantizedLinearMethod
from nanovllm.quantization.quantized_method import fuses_gate, pack_blocks, packed_memory


class _Run(NamedTuple):
    """Parts of one form that follow each other, and where their bytes are."""

    segment: Segment
    parts: list[Part]
    size: int


class GGUFLinearMethod(UnquantizedLinearMethod):
    """Keeps what it is given, blocks or floats, until a layer is complete."""

    def __init__(self, ops: Ops) -> None:
        super().__init__(ops)
        self.embeds = True

    def takes(self, kind: str) -> bool:
        return kind in KINDS

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
        runs = self._runs(layer, loaded)
        segments, size = tuple(run.segment for run in runs), sum(run.size for run in runs)
        if loaded.stack is None:
            memory = packed_memory(self._ops, size, layer.weight.device)
        else:
            memory = self._shared(loaded, segments, size, layer.weight.device)
        for run in runs:
            self._pack(layer, run, memory[run.segment.start : run.segment.start + run.size], loaded.dtype)
        layer.weight = nn.Parameter(memory, requires_grad=False)
        layer.quantized, layer.loaded = Packed(memory, segments, loaded.dtype), None

    def num_bytes(self, layer: LinearWeights, device: torch.device) -> None:
        return None

    def _runs(self, layer: LinearWeights, loaded: Loaded) -> list[_Run]:
        parts = sorted(loaded.parts, key=lambda part: part.rows.start)
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
            size = self._bytes(form, end - rows.start, layer.cols, loaded.dtype)
            runs.append(_Run(Segment(rows, form, start), together, size))
            start += runs[-1].size
        return runs

    def _bytes(self, form: Format | None, rows: int, cols: int, dtype: torch.dtype) -> int:
        if form is None:
            return self._ops.packed_numel(rows, cols, dtype) * dtype.itemsize
        return self._ops.codes_bytes(form, rows, cols)

    def _shared(self, loaded: Loaded, segments: tuple[Segment, ...], size: int, device: torch.device) -> torch.Tensor:
        """This expert's part of the memory of all."""
        stack = loaded.stack
        assert stack is not None
        if isinstance(stack.weight, torch.Tensor):
            memory = packed_memory(self._ops, loaded.layers * size, device)
            stack.weight = Packed(memory.view(loaded.layers, size), segments, loaded.dtype)
        if stack.weight.segments != segments:
            raise WeightError("experts of one layer have different GGML types: set quantization='dequantize'")
        return stack.weight.data[loaded.index]

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


def _form(part: Part) -> Format | None:
    return part.tensor.form if isinstance(part.tensor, Blocks) else None


def _floats(tensor: torch.Tensor | Blocks) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, Blocks) else tensor
