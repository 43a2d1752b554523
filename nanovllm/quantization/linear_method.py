"""LinearMethod: the seam where quantisation enters; plain weights are one method of it."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn


class LinearWeights(nn.Module):
    """What a linear layer lends to its method: a place for the weight in the method's form."""

    weight: torch.Tensor
    packed: bool


class LinearMethod(Protocol):
    """One object serves all linear layers; what it stores lives in the layer."""

    def create(self, layer: LinearWeights, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> None:
        """Register the layer's `weight`, [rows, cols], uninitialised."""

    def load(self, layer: LinearWeights, tensor: torch.Tensor, rows: slice) -> None:
        """Copy `tensor` to these rows."""

    def finalize(self, layer: LinearWeights) -> None:
        """Bring the complete weight into the form that `apply` wants."""

    def apply(self, layer: LinearWeights, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, cols] @ weight.T + bias -> [T, rows]."""
        ...


class UnquantizedLinearMethod:
    """The weight as it is; on CPUs that multiply bfloat16, packed once for oneDNN.

    Packing saves oneDNN from reordering the weight on every call: 1.6x at one row and 1.6x at
    32 on a 576 x 3072 matrix (docs/benchmarks.md).
    """

    def create(self, layer: LinearWeights, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> None:
        layer.weight = nn.Parameter(torch.empty(rows, cols, dtype=dtype, device=device), requires_grad=False)
        layer.packed = False

    def load(self, layer: LinearWeights, tensor: torch.Tensor, rows: slice) -> None:
        layer.weight[rows].copy_(tensor)

    def finalize(self, layer: LinearWeights) -> None:
        layer.packed = packs(layer.weight.device, layer.weight.dtype)
        if layer.packed:
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
            layer.weight = nn.Parameter(packed, requires_grad=False)

    def apply(self, layer: LinearWeights, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if layer.packed:
            # oneDNN sums a single row in another order; as one of two it gets the bits it has in any batch
            rows = x.expand(2, -1) if len(x) == 1 else x
            return torch.ops.mkldnn._linear_pointwise(rows, layer.weight, bias, "none", [], "")[: len(x)]
        return F.linear(x, layer.weight, bias)


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether plain weights are packed here: a linear layer then has one of its own, even if it is tied."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
