"""Normalisation layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanovllm.build_context import BuildContext
from nanovllm.layers.weight_layer import WeightLayer


class RMSNorm(WeightLayer):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019); statistics in fp32."""

    weight: torch.Tensor

    def __init__(self, size: int, eps: float, ctx: BuildContext) -> None:
        super().__init__()
        self._size = (size,)
        self._eps = eps
        self.add_parameter("weight", self._size, ctx.dtype, ctx.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., size]
        return F.rms_norm(x, self._size, self.weight, self._eps)
