"""Memory of the host straight from the operating system."""

from __future__ import annotations

import math
import mmap

import torch


def mapped_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Pages that become real when they are first touched, huge ones where the system has them, and that go
    back when the tensor does. What malloc gets back it may keep, and it has huge pages for nobody."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size).view(dtype).view(shape)
