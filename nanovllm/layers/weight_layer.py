"""WeightLayer: a layer that knows which tensors it wants and how to take them in."""

from __future__ import annotations

import torch
from torch import nn


class WeightLayer(nn.Module):
    """Base of every layer with parameters. Plain parameters need nothing more than this."""

    def add_parameter(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """An uninitialised parameter, to be loaded."""
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False))

    def expected_weights(self) -> dict[str, dict[str | None, tuple[int, ...]]]:
        """{parameter: {shard or None: its whole shape on disk}}."""
        return {name: {None: tuple(p.shape)} for name, p in self._parameters.items() if p is not None}

    def load_weight(self, parameter: str, tensor: torch.Tensor, shard: str | None) -> None:
        """Copy a tensor from disk (any float dtype) into its place."""
        target = self._parameters[parameter]
        assert target is not None and shard is None
        target.copy_(tensor)

    def finalize_weights(self) -> None:
        """Called once after loading: pack, transpose, quantise."""
