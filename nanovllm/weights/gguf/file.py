"""GGUFFile: the header of a GGUF file and the tensors behind it, in GGUF's own names.

The header is parsed here: `gguf.GGUFReader` takes seconds over a tokenizer's token list, which
would be most of the start-up. Dequantisation is the `gguf` package's.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nanovllm.errors import ModelNotSupported, WeightError
from nanovllm.host_memory import mapped_zeros

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_F32, _F16, _BF16 = 0, 1, 30
_PLAIN = {_F32: torch.float32, _F16: torch.float16, _BF16: torch.bfloat16}
_CHUNK_BYTES = 1 << 18  # of quantised data at a time: the temporaries stay in the cache


class TensorInfo(NamedTuple):
    """shape: as PyTorch has it. kind: GGML's number of the type. offset: bytes into the data."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class GGUFFile:
    """The parsed header over a memory map.

    metadata: the key-value section. tensors: {name: TensorInfo}, in the file's order.
    """

    def __init__(self, path: Path) -> None:
        """Raises WeightError for what is no whole header."""
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # mmap of an empty file is a ValueError
            raise WeightError(f"cannot read {path}: {error}") from error
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._parse()
        except (struct.error, IndexError, KeyError, UnicodeDecodeError, OverflowError, RecursionError) as error:
            raise WeightError(f"{path} is not a whole GGUF file (damaged header: {error!r}); fetch it again") from error

    def float_type(self) -> str:
        """float32 or float16 if all matrices are, but for small ones that always stay float32;
        quantised files count as bfloat16."""
        kinds = {info.kind for info in self.tensors.values() if len(info.shape) > 1} - {_F32}
        return {frozenset(): "float32", frozenset({_F16}): "float16"}.get(frozenset(kinds), "bfloat16")

    def locate(self, name: str) -> tuple[Any, int, int]:
        """(GGML type, start in the file, bytes of a row); WeightError unless all of the tensor is there."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        info = self.tensors[name]
        try:
            kind = GGMLQuantizationType(info.kind)
        except ValueError:
            raise WeightError(f"{self.path}: tensor {name} has unknown GGML type {info.kind}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        *rows, cols = info.shape
        if cols % block:
            raise WeightError(f"{self.path}: rows of {cols} in tensor {name} are not whole {kind.name} blocks")
        start, row_bytes = self._data_start + info.offset, cols // block * block_bytes
        if start + math.prod(rows) * row_bytes > len(self._map):
            raise WeightError(f"{self.path} is cut short: tensor {name} ends beyond the file; fetch it again")
        return kind, start, row_bytes

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """One tensor, or slice `index` of its first dimension alone; dequantised to float32
        unless it is stored as float16 or bfloat16."""
        info = self.tensors[name]
        raw = self._raw(name, index)
        shape = info.shape if index is None else info.shape[1:]
        if info.kind in _PLAIN:
            tensor = torch.from_numpy(raw.copy()).view(_PLAIN[info.kind]).view(shape)
        else:
            tensor = _dequantize(raw, self.locate(name)[0], shape)
        self._forget_pages()
        return tensor

    def read_bytes(self, name: str, index: int | None = None, *, device: str = "cpu") -> torch.Tensor:
        """The same as it lies in the file: uint8 [..., rows, bytes of a row]. device: "meta" reads nothing."""
        shape = self.tensors[name].shape if index is None else self.tensors[name].shape[1:]
        raw = self._raw(name, index)
        if device == "meta":
            return torch.empty(*shape[:-1], raw.shape[1], dtype=torch.uint8, device=device)
        copy = mapped_zeros((raw.size,), torch.uint8)  # what malloc gets back it may keep
        copy.numpy()[:] = raw.reshape(-1)
        self._forget_pages()
        return copy.view(*shape[:-1], -1)

    def quantized_kind(self, name: str) -> str | None:
        """GGML's name of a type of blocks; None for others."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        kind = self.tensors[name].kind
        found = next((k for k, (block, _) in GGML_QUANT_SIZES.items() if k == kind and block > 1), None)
        return None if found is None else GGMLQuantizationType(found).name

    def _raw(self, name: str, index: int | None) -> np.ndarray:
        """Rows [R, bytes] in the memory map."""
        _, start, row_bytes = self.locate(name)
        shape = self.tensors[name].shape if index is None else self.tensors[name].shape[1:]
        size = math.prod(shape[:-1]) * row_bytes
        raw = np.frombuffer(self._map, dtype=np.uint8, count=size, offset=start + (index or 0) * size)
        return raw.reshape(-1, row_bytes)

    def _forget_pages(self) -> None:
        """That were read: they would count as this process's memory."""
        if sys.platform != "win32":
            self._map.madvise(mmap.MADV_DONTNEED)

    def _parse(self) -> None:
        magic, version, num_tensors, num_values = self._unpack("<4sIQQ", 0)
        if magic != b"GGUF" or version not in (2, 3):
            raise WeightError(f"{self.path} is not a GGUF file of version 2 or 3")
        at = 24
        for _ in range(num_values):
            key, at = self._string(at)
            (kind,) = self._unpack("<I", at)
            self.metadata[key], at = self._value(kind, at + 4)
        for _ in range(num_tensors):
            name, at = self._string(at)
            (num_dims,) = self._unpack("<I", at)
            if not 1 <= num_dims <= 4:
                raise IndexError(f"{num_dims} dimensions")
            *dims, kind, offset = self._unpack(f"<{num_dims}QIQ", at + 4)
            if 0 in dims:
                raise IndexError("an empty tensor")
            if name in self.tensors:
                raise KeyError(f"tensor {name} twice")
            self.tensors[name] = TensorInfo(tuple(reversed(dims)), kind, offset)
            at += 4 + 8 * num_dims + 12
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise IndexError(f"alignment {alignment!r}")
        self._data_start = -(-at // alignment) * alignment

    def _unpack(self, form: str, at: int) -> tuple[Any, ...]:
        return struct.unpack_from(form, self._map, at)

    def _string(self, at: int) -> tuple[str, int]:
        (size,) = self._unpack("<Q", at)
        if at + 8 + size > len(self._map):
            raise IndexError("a string ends beyond the file")
        return self._map[at + 8 : at + 8 + size].decode(), at + 8 + size

    def _value(self, kind: int, at: int) -> tuple[Any, int]:
        if kind == _STRING:
            return self._string(at)
        if kind != _ARRAY:
            form = "<" + _SCALARS[kind]
            return self._unpack(form, at)[0], at + struct.calcsize(form)
        item, count = self._unpack("<IQ", at)
        at += 12
        if item in _SCALARS:
            form = f"<{count}{_SCALARS[item]}"
            return list(self._unpack(form, at)), at + struct.calcsize(form)
        if item == _STRING:
            return self._strings(count, at)
        values = []
        for _ in range(count):
            value, at = self._value(item, at)
            values.append(value)
        return values, at

    def _strings(self, count: int, at: int) -> tuple[list[str], int]:
        """A tokenizer has hundreds of thousands: one loop, without a call for each."""
        data, size_at = self._map, struct.Struct("<Q").unpack_from
        values = []
        for _ in range(count):
            start = at + 8
            at = start + size_at(data, at)[0]
            values.append(data[start:at].decode())
        if at > len(data):
            raise IndexError("a string ends beyond the file")
        return values, at


def _dequantize(rows: np.ndarray, kind: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """Quantised rows to float32, in pieces whose temporaries fit a core's cache (twice as fast
    as whole tensors; threads gain nothing, they wait for the interpreter)."""
    from gguf.quants import dequantize

    out = np.empty((rows.shape[0], shape[-1]), dtype=np.float32)
    step = max(1, _CHUNK_BYTES // rows.shape[1])
    try:
        for start in range(0, len(rows), step):
            out[start : start + step] = dequantize(rows[start : start + step], kind)
    except NotImplementedError as error:
        raise ModelNotSupported(f"GGML type {kind.name} cannot be dequantised: {error}") from error
    return torch.from_numpy(out).view(shape)
