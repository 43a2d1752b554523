"""Normalisation layers."""

from __future__ import annotations

import torch

from nanovllm.build_context import BuildContext
from nanovllm.layers.weight_layer import WeightLayer
from nanovllm.quantization.blocks import Blocks


class RMSNorm(WeightLayer):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019); statistics in fp32."""

    weight: torch.Tensor

    def __init__(self, size: int, eps: float, ctx: BuildContext) -> None:
        super().__init__()
        self._size = (size,)
        self.eps = eps
        self._ops = ctx.ops
        self.add_parameter("weight", self._size, ctx.hidden_dtype, ctx.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., size]
        return self._ops.rms_norm(x, self.weight, self.eps)


class GemmaRMSNorm(RMSNorm):
    """Gemma's RMSNorm: the weight on disk is the difference from one; in fp32."""

    def __init__(self, size: int, eps: float, ctx: BuildContext) -> None:
        super().__init__(size, eps, ctx)
        self.add_parameter("weight", self._size, torch.float32, ctx.device)

    def load_weight(self, parameter: str, tensor: torch.Tensor | Blocks, shard: str | None) -> None:
        assert isinstance(tensor, torch.Tensor)
        super().load_weight(parameter, 1.0 + tensor.float(), shard)


class LayerNorm(WeightLayer):
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016)."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, size: int, eps: float, ctx: BuildContext, *, bias: bool = True) -> None:
        super().__init__()
        self._size = (size,)
        self._eps = eps
        self._ops = ctx.ops
        self.add_parameter("weight", self._size, ctx.hidden_dtype, ctx.device)
        self.register_parameter("bias", None)
        if bias:
            self.add_parameter("bias", self._size, ctx.hidden_dtype, ctx.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., size]
        return self._ops.layer_norm(x, self.weight, self.bias, self._eps)
