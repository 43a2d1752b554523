"""LazyTensor: a named tensor on disk, read when it is wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanovllm.quantization.blocks import Blocks


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """shape: as PyTorch has it. load: reads (and dequantises) it into a CPU tensor.

    kind: name of what it is quantised in, for messages. load_blocks: the matrix of all its rows [..., row], if there
    is code for the kind; for device "meta" its shape alone. transposed: whether these rows are the tensor's columns.
    spare: whether models may do without it.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]
    kind: str | None = None
    load_blocks: Callable[[str], Blocks] | None = None
    transposed: bool = False
    spare: bool = False
