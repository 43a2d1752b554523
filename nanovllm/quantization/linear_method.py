"""LinearMethod: the seam where quantisation enters; plain weights are one method of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import nn

from nanovllm.host_memory import mapped_zeros
from nanovllm.ops.base import Ops
from nanovllm.ops.formats import Packed
from nanovllm.quantization.blocks import Blocks


class LinearWeights(nn.Module):
    """What a linear layer lends to its method: a place for the weight in the method's form.

    rows, cols: of the weight, whatever its form. quantized: what ops take in the place of `weight`, which holds its
    bytes, where it is quantised. loaded: what a method keeps until it finalizes. act: the activation that the layer
    ends with; where `gated`, it is that of the first half of the results, which multiplies the second. place: memory
    that the finalized weight goes to, if it shares it with other layers'.
    """

    weight: torch.Tensor
    method: LinearMethod
    rows: int
    cols: int
    packed: bool
    quantized: Packed | None = None
    loaded: Loaded | None = None
    act: str | None = None
    gated: bool = False
    place: torch.Tensor | None = None


@dataclass(slots=True)
class Stack:
    """Memory [layers, ...] that the weights of like layers share once finalized; as ops take it."""

    weight: torch.Tensor | Packed


class Part(NamedTuple):
    """Rows of a weight."""

    rows: slice
    tensor: torch.Tensor | Blocks


@dataclass(slots=True)
class Loaded:
    """Parts of a layer that is not complete. dtype: of what floats become. stack, index: what it shares with how many
    layers, and which it is."""

    dtype: torch.dtype
    parts: list[Part] = field(default_factory=list)
    stack: Stack | None = None
    index: int = 0
    layers: int = 1


class LinearMethod(Protocol):
    """One object serves all linear layers; what it stores lives in the layer.

    group: columns of a weight that cannot be parted. takes_blocks: whether `load` takes what is quantised on disk.
    embeds: whether `embed` reads rows of a finalized weight.
    """

    group: int
    takes_blocks: bool
    embeds: bool

    def create(self, layer: LinearWeights, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> None:
        """Register the layer's `weight`, [rows, cols], uninitialised."""

    def stack(self, layers: Sequence[LinearWeights]) -> Stack:
        """Where the weights of like layers go once finalized, or from the start if they stay as they are."""
        ...

    def convert(self, tensor: torch.Tensor | Blocks) -> torch.Tensor | Blocks:
        """Whole rows of a weight on disk to what `load` takes, of which columns can be taken before."""
        ...

    def load(self, layer: LinearWeights, tensor: torch.Tensor | Blocks, rows: slice) -> None:
        """Copy what `convert` gave to these rows."""

    def finalize(self, layer: LinearWeights) -> None:
        """Bring the complete weight into the form that `apply` wants."""

    def num_bytes(self, layer: LinearWeights, device: torch.device) -> int | None:
        """Of the weight's own memory once finalized there; None if it stays what `create` made, or a tied one."""
        ...

    def apply(
        self,
        layer: LinearWeights,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """act(x [T, cols] @ weight.T + bias) -> [T, rows]; where gated, act(first half) * second half.

        residual: [T, rows], added to the result of a layer without an activation. Its memory may become the
        result's."""
        ...

    def embed(self, layer: LinearWeights, ids: torch.Tensor, first: int) -> torch.Tensor:
        """The weight's rows of these ids, the first of which is `first`; zeros for others."""
        ...


class UnquantizedLinearMethod:
    """The weight as it is, or packed once if the ops multiply faster so."""

    group = 1
    takes_blocks = False

    def __init__(self, ops: Ops) -> None:
        self._ops, self.embeds = ops, ops.embeds_packed

    def create(self, layer: LinearWeights, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> None:
        if device.type == "cpu" and self._ops.packs(device, dtype):
            # soon to be freed: memory that malloc keeps would be missing then
            weight = mapped_zeros((rows, cols), dtype)
        else:
            weight = torch.empty(rows, cols, dtype=dtype, device=device)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.rows, layer.cols, layer.packed = rows, cols, False

    def stack(self, layers: Sequence[LinearWeights]) -> Stack:
        weight = layers[0].weight
        rows, cols = weight.shape
        if not self._ops.packs(weight.device, weight.dtype):
            stack = weight.new_zeros(len(layers), rows, cols)
            for layer, place in zip(layers, stack, strict=True):
                layer.weight = nn.Parameter(place, requires_grad=False)
            return Stack(stack)
        shape = len(layers), self._ops.packed_numel(rows, cols, weight.dtype)
        stack = mapped_zeros(shape, weight.dtype) if weight.device.type == "cpu" else weight.new_zeros(shape)
        for layer, place in zip(layers, stack, strict=True):
            layer.place = place
        return Stack(stack)

    def convert(self, tensor: torch.Tensor | Blocks) -> torch.Tensor | Blocks:
        return tensor

    def load(self, layer: LinearWeights, tensor: torch.Tensor | Blocks, rows: slice) -> None:
        assert isinstance(tensor, torch.Tensor)
        layer.weight[rows].copy_(tensor)

    def finalize(self, layer: LinearWeights) -> None:
        weight = layer.weight.detach()
        if weight.device.type == "meta":  # of a model that is only measured
            return
        layer.packed = self._ops.packs(weight.device, weight.dtype)
        if layer.packed:
            packed = self._ops.pack(weight, gated=layer.gated and self._fuses(layer), out=layer.place)
            layer.weight = nn.Parameter(packed, requires_grad=False)

    def num_bytes(self, layer: LinearWeights, device: torch.device) -> int | None:
        (rows, cols), dtype = layer.weight.shape, layer.weight.dtype
        if not self._ops.packs(device, dtype):
            return None
        return self._ops.packed_numel(rows, cols, dtype) * dtype.itemsize

    def apply(
        self,
        layer: LinearWeights,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert residual is None or layer.act is None
        if not layer.packed:
            return self._activated(layer, self._ops.plain_linear(x, layer.weight, bias, residual))
        weight = layer.weight if layer.quantized is None else layer.quantized
        if not self._fuses(layer):
            return self._activated(layer, self._ops.linear(x, weight, layer.rows, bias))
        if layer.gated:
            assert layer.act is not None
            return self._ops.gated_linear(x, weight, layer.rows, bias, layer.act)
        return self._ops.linear(x, weight, layer.rows, bias, layer.act, residual)

    def embed(self, layer: LinearWeights, ids: torch.Tensor, first: int) -> torch.Tensor:
        weight = layer.weight if layer.quantized is None else layer.quantized
        return self._ops.embed_packed(weight, ids, first, (layer.rows, layer.cols))

    def _fuses(self, layer: LinearWeights) -> bool:
        return layer.act is None or self._ops.fuses(layer.act)

    def _activated(self, layer: LinearWeights, x: torch.Tensor) -> torch.Tensor:
        return x if layer.act is None else self._ops.activate(x, layer.act, gated=layer.gated)
