"""A step is written down, and then run by one native call: on the CPU what a CUDA graph is on a GPU, but that it can
be run again for fewer tokens and sequences than it was recorded with.

While a step is recorded nothing is computed: the library writes down the calls it gets. The tensors of
the step come from a pool, so that the calls can run again at the same addresses. torch's dispatcher is
watched: plain arithmetic is handed to the library, and anything else but a view ends the recording.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm.errors import PeerLost
from nanovllm.ops.graph import CannotRecord, StepSizes
from nanovllm.ops.library import Library

aten = torch.ops.aten
_LINE = 64  # bytes
_ADD, _SCALE, _DIVIDE, _CLAMP = range(4)  # csrc/kernels.h


class NativeGraph:
    """The calls of one step."""

    def __init__(self, library: Library) -> None:
        self._library, self._tape = library, library.recorded()
        weakref.finalize(self, library.free, self._tape)
        self._sizes: StepSizes | None = None

    def fit(self, sizes: StepSizes) -> None:
        """sizes: those that it was recorded with, each another number, so that its calls say which of them they follow.
        CannotRecord if one follows none."""
        if self._library.fit(self._tape, *sizes) != 0:
            raise CannotRecord("a call over other rows than a step's")
        self._sizes = sizes

    def resize(self, sizes: StepSizes) -> None:
        """Of the replays to come; none larger than the first. What is behind the rows of a tensor stays as it is."""
        if sizes != self._sizes:
            self._library.resize(self._tape, *sizes)
            self._sizes = sizes

    def replay(self) -> None:
        if self._library.replay(self._tape, torch.get_num_threads()) != 0:
            raise PeerLost()


class NativeRecorder:
    """Records steps that never run at the same time: they share the memory between their first call
    and their last one."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._pool = _Pool()

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, NativeGraph]:
        """As Recorder.record."""
        self._pool.reclaim()
        self._library.record()
        try:
            with _Watch(self._library, self._pool):
                result = run()
        finally:
            graph = NativeGraph(self._library)
        return result, graph


class _Watch(TorchDispatchMode):
    """What torch is asked for while a step is recorded."""

    def __init__(self, library: Library, pool: _Pool) -> None:
        super().__init__()
        self._library, self._pool = library, pool
        self._arithmetic: dict[Any, Callable[..., torch.Tensor]] = {
            aten.add.Tensor: lambda x, y: self._map(_ADD, x, y=y),
            aten.mul.Tensor: lambda x, a: self._map(_SCALE, x, a),
            aten.div.Tensor: lambda x, a: self._map(_DIVIDE, x, a),
            aten.clamp.default: lambda x, low, high: self._map(_CLAMP, x, low, high),
        }

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would import its compiler, which takes a second, to tell it to look away."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.empty.memory_format:
            return self._pool.empty(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        if func in self._arithmetic and not kwargs:
            return self._arithmetic[func](*args)
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if func.is_view:
            return func(*args, **kwargs)
        raise CannotRecord(str(func))

    def _map(self, kind: int, x: Any, a: Any = 0.0, b: Any = 0.0, y: torch.Tensor | None = None) -> Any:
        """Of floats that lie side by side; y of the same shape."""
        tensors = [x] if y is None else [x, y]
        if not all(_is_plain(t) and t.shape == x.shape for t in tensors) or not all(map(_is_number, (a, b))):
            raise CannotRecord(f"arithmetic on {[getattr(t, 'shape', t) for t in (x, y, a, b)]}")
        out = self._pool.empty(x.shape, torch.float32)
        second = None if y is None else y.data_ptr()
        threads = torch.get_num_threads()
        rows, width = len(x) if x.dim() else 1, math.prod(x.shape[1:])
        self._library.elementwise(kind, x.data_ptr(), second, a, b, out.data_ptr(), rows, width, threads)
        return out


@functools.cache
def _is_composite(func: Any) -> bool:
    """Made of others: reshape is a view or a copy, which shows when it is taken apart."""
    if func in (aten.resolve_conj.default, aten.resolve_neg.default):  # tolist() and numpy() begin with these
        raise CannotRecord("reading a tensor in Python")
    return func._can_decompose()


def _is_plain(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype == torch.float32 and x.is_contiguous()


def _is_number(a: Any) -> bool:
    return isinstance(a, (int, float))


class _Pool:
    """Memory that a tensor gives back when it is gone, for the next of about its size."""

    def __init__(self) -> None:
        self._buffers: list[np.ndarray] = []
        self._free: dict[int, list[np.ndarray]] = {}
        self._recording = 0

    def reclaim(self) -> None:
        """Whatever still refers to a buffer will see it overwritten."""
        self._recording += 1
        self._free = defaultdict(list)
        for buffer in self._buffers:
            self._free[len(buffer)].append(buffer)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        size = max(_LINE, 1 << (num_bytes - 1).bit_length())
        free = self._free[size]
        buffer = free.pop() if free else self._new_buffer(size)
        lease = buffer[:num_bytes]
        weakref.finalize(lease, self._give_back, buffer, self._recording)
        return torch.from_numpy(lease).view(dtype).view(*shape)

    def _new_buffer(self, size: int) -> np.ndarray:
        try:
            memory = np.empty(size + _LINE, dtype=np.uint8)  # becomes real where it is touched
        except MemoryError as error:
            raise CannotRecord(f"no memory for a tensor of {size} bytes") from error
        start = -memory.ctypes.data % _LINE
        self._buffers.append(memory[start : start + size])
        return self._buffers[-1]

    def _give_back(self, buffer: np.ndarray, recording: int) -> None:
        if recording == self._recording:
            self._free[len(buffer)].append(buffer)
