"""LinearMethods of quantised weights, for kernels that multiply by them and for those that cannot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nanovllm.ops.base import Ops
from nanovllm.ops.formats import Format, Packed, Segment
from nanovllm.quantization.blocks import Blocks
from nanovllm.quantization.linear_method import LinearWeights, Stack, UnquantizedLinearMethod
from nanovllm.quantization.searched import Searched


class DequantizedLinearMethod(UnquantizedLinearMethod):
    """Quantised, and widened again while it is loaded: the values of a scheme, without what it saves."""

    def __init__(self, ops: Ops, form: Format) -> None:
        super().__init__(ops)
        self._form, self.group = form, form.group

    def convert(self, tensor: torch.Tensor | Blocks) -> torch.Tensor:
        assert isinstance(tensor, torch.Tensor)
        return self._ops.quantize(tensor, self._form).dequantize()


class QuantizedLinearMethod(UnquantizedLinearMethod):
    """Quantises and packs each tensor as it comes, a piece after the other, where the layer is. What is quantised on
    disk is widened by such pieces."""

    takes_blocks = True

    def __init__(self, ops: Ops, form: Format) -> None:
        super().__init__(ops)
        self._form, self.group, self.embeds = form, form.group, True

    def create(self, layer: LinearWeights, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> None:
        layer.rows, layer.cols, layer.packed = rows, cols, True
        self._place(layer, packed_memory(self._ops, self._ops.codes_bytes(self._form, rows, cols), device), dtype)

    def stack(self, layers: Sequence[LinearWeights]) -> Stack:
        first = layers[0]
        assert first.quantized is not None
        size, segments, dtype = first.weight.numel(), first.quantized.segments, first.quantized.dtype
        data = packed_memory(self._ops, len(layers) * size, first.weight.device).view(len(layers), size)
        for layer, place in zip(layers, data, strict=True):
            self._place(layer, place, dtype)
        return Stack(Packed(data, segments, dtype=dtype))

    def convert(self, tensor: torch.Tensor | Blocks) -> Blocks:
        return Searched.whole(self._ops, self._form, tensor)

    def load(self, layer: LinearWeights, tensor: torch.Tensor | Blocks, rows: slice) -> None:
        assert isinstance(tensor, Blocks)
        pack_blocks(self._ops, layer, tensor, rows.start, layer.weight)

    def finalize(self, layer: LinearWeights) -> None:
        """It is packed already."""

    def num_bytes(self, layer: LinearWeights, device: torch.device) -> None:
        return None

    def _place(self, layer: LinearWeights, memory: torch.Tensor, dtype: torch.dtype) -> None:
        layer.weight = nn.Parameter(memory, requires_grad=False)
        layer.quantized = Packed(memory, (Segment(slice(0, layer.rows), self._form, 0),), dtype=dtype)


def packed_memory(ops: Ops, size: int, device: torch.device) -> torch.Tensor:
    if device.type == "meta":
        return torch.empty(size, dtype=torch.uint8, device=device)
    return ops.zeros(size, device)


def fuses_gate(layer: LinearWeights, ops: Ops) -> bool:
    """Whether the halves of the layer's weight lie side by side."""
    return layer.gated and (layer.act is None or ops.fuses(layer.act))


def pack_blocks(ops: Ops, layer: LinearWeights, blocks: Blocks, first: int, out: torch.Tensor) -> None:
    """Blocks into row `first` and those that follow. out: memory of the layer's rows of this form."""
    if out.device.type == "meta":
        return
    half = None
    if fuses_gate(layer, ops):
        half, first = 0 if first == 0 else 1, 0
    for start, codes in blocks.to(out.device).pieces():
        ops.pack_codes(codes, first + start, out, half=half)
