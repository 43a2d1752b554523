"""WeightLayer: a layer that knows which tensors it wants and how to take them in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nanovllm.quantization.blocks import Blocks


class WeightLayer(nn.Module):
    """Base of every layer with parameters. Plain parameters need nothing more than this."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: dict[str, tuple[tuple[int, ...], Sequence[slice]]] = {}

    def add_parameter(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """An uninitialised parameter, to be loaded."""
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False))

    def add_part(
        self, name: str, shape: tuple[int, ...], parts: Sequence[slice], dtype: torch.dtype, device: torch.device
    ) -> None:
        """The same for a parameter that is of this shape on disk, of which this rank has some rows."""
        rows = sum(part.stop - part.start for part in parts)
        self.add_parameter(name, (rows, *shape[1:]), dtype, device)
        self._parts[name] = shape, parts

    def expected_weights(self) -> dict[str, dict[str | None, tuple[int, ...]]]:
        """{parameter: {shard or None: its whole shape on disk}}."""
        whole = {name: tuple(p.shape) for name, p in self._parameters.items() if p is not None}
        whole |= {name: shape for name, (shape, _) in self._parts.items()}
        return {name: {None: shape} for name, shape in whole.items()}

    def takes_blocks(self, parameter: str) -> bool:
        """Whether `load_weight` takes blocks in the place of floats."""
        return False

    def load_weight(self, parameter: str, tensor: torch.Tensor | Blocks, shard: str | None) -> None:
        """Copy a tensor from disk (any float dtype) into its place."""
        target = self._parameters[parameter]
        assert target is not None and shard is None and isinstance(tensor, torch.Tensor)
        if parameter in self._parts:
            _, parts = self._parts[parameter]
            tensor = torch.cat([tensor[part] for part in parts])
        target.copy_(tensor)

    def finalize_weights(self) -> None:
        """Called once after loading: pack, transpose, quantise."""
