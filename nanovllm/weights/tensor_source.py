"""LazyTensor: a named tensor on disk, read when it is wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """shape: as PyTorch has it. load: reads (and dequantises) it into a CPU tensor."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]
