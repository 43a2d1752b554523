"""LazyTensor: a named tensor on disk, read when it is wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """shape: as PyTorch has it. load: reads (and dequantises) it into a CPU tensor.

    kind: GGML's name of the type that it is quantised in. load_blocks: reads its bytes then, uint8 [..., rows,
    bytes of a row], for device "cpu"; for "meta" it tells their shape.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]
    kind: str | None = None
    load_blocks: Callable[[str], torch.Tensor] | None = None
