"""Between the host's arrays and the device's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")

_ALIGNMENT = 16  # bytes


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Tensors of the arrays' types and shapes; on CPUs they share memory. To a GPU all go in one copy, which
    neither waits for what runs there nor lets the host wait."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    # torch gives pinned memory to nobody else before the copies from it are done
    staged = torch.empty(packed_bytes(arrays), dtype=torch.uint8, pin_memory=True)
    pack(arrays, staged.numpy())
    return unpack(staged.to(device, non_blocking=True), arrays)


def packed_bytes(arrays: Sequence[np.ndarray]) -> int:
    return sum(map(_room, arrays))


def pack(arrays: Sequence[np.ndarray], out: np.ndarray) -> None:
    """Write the arrays one behind the other into uint8 [packed_bytes]."""
    start = 0
    for array in arrays:
        out[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start += _room(array)


def unpack(packed: torch.Tensor, like: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Views of what `pack` wrote, with the arrays' types and shapes."""
    tensors, start = [], 0
    for array in like:
        dtype = torch.from_numpy(array[:0]).dtype
        tensors.append(packed[start : start + array.nbytes].view(dtype).view(array.shape))
        start += _room(array)
    return tensors


def _room(array: np.ndarray) -> int:
    return -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT


def to_host(tensors: Sequence[torch.Tensor], make: Callable[..., T]) -> Future[T]:
    """What `make` makes of the tensors' values, an array of each, once they are there: all at the same time, without
    letting the host wait before. At once on CPUs."""
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return _Arriving(tensors, make)
    return Present(make(*(tensor.numpy() for tensor in tensors)))


class Present(Future[T]):
    """Done from the start, without the locks of a future that somebody waits for: they take longer than the host's
    share of a step should."""

    def __init__(self, value: T) -> None:
        self._value = value

    def done(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> T:
        return self._value


class _Arriving(Future[T]):
    """Done when the device has done what it was asked before."""

    def __init__(self, tensors: Sequence[torch.Tensor], make: Callable[..., T]) -> None:
        super().__init__()
        self._make = make
        self._copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        for copy, tensor in zip(self._copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(tensors[0].device))

    def done(self) -> bool:
        return self._event.query()

    def result(self, timeout: float | None = None) -> T:
        assert timeout is None
        self._event.synchronize()
        return self._make(*(copy.numpy() for copy in self._copies))
