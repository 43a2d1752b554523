"""Weight files of Hugging Face directories: safetensors, and PyTorch's pickles without their code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nanovllm.errors import WeightError
from nanovllm.quantization.raw import Raw
from nanovllm.weights.tensor_source import LazyTensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "BOOL": torch.bool,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
}
"""As safetensors calls them."""
_MAPPED_BYTES = 1 << 28  # of a file at a time

Reader = Callable[[str], torch.Tensor]


def read_shard(file: Path) -> Iterator[Raw]:
    """The tensors of a `.safetensors` or `.bin` file; WeightError for what is damaged or no tensor."""
    return _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)


def as_lazy(raw: Raw) -> LazyTensor:
    """WeightError, once it is loaded, for what are no floats."""
    return LazyTensor(raw.name, raw.shape, functools.partial(_floats, raw))


def _floats(raw: Raw) -> torch.Tensor:
    if raw.dtype not in _FLOATS:
        raise WeightError(
            f"{raw.file}: the tensor {raw.name} is {raw.dtype}; weights must be floats of 16, 32 or 64 bits"
        )
    return raw.load()


def _safetensors(file: Path) -> Iterator[Raw]:
    header = _open_safetensors(file)
    found = {name: header.get_slice(name) for name in header.keys()}  # noqa: SIM118 - not a dict
    infos = {name: (tuple(info.get_shape()), info.get_dtype()) for name, info in found.items()}
    del header, found
    shard = _Shard(file, lambda: _open_safetensors(file).get_tensor)
    for name, (shape, kind) in infos.items():
        if kind not in _TYPES:
            raise WeightError(f"{file}: the tensor {name} is {kind}, which is not supported")
        yield Raw(file, name, shape, _TYPES[kind], functools.partial(shard.load, name))


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightError(f"{file} is damaged ({error}); fetch it again") from error


def _pickled(file: Path) -> Iterator[Raw]:
    """Mapped where the format allows it. What PyTorch wrote before 1.6 is read as a whole, and each
    tensor then goes as soon as it was used."""
    is_mapped = _is_zip(file)
    tensors = _unpickle(file, mmap=is_mapped)
    infos = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if not is_mapped:
        for name, (shape, dtype) in infos.items():
            yield Raw(file, name, shape, dtype, tensors.pop(name).detach)
        return
    del tensors
    shard = _Shard(file, lambda: _unpickle(file, mmap=True).__getitem__)
    for name, (shape, dtype) in infos.items():
        yield Raw(file, name, shape, dtype, functools.partial(shard.load, name))


def _is_zip(file: Path) -> bool:
    try:
        with open(file, "rb") as start:
            return start.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise WeightError(f"cannot read {file}: {error}") from error


def _unpickle(file: Path, *, mmap: bool) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        is_plain = all(isinstance(name, str) and _is_plain(tensor) for name, tensor in tensors.items())
    except Exception as error:  # damaged files raise whatever the unpickler comes across
        raise WeightError(
            f"{file} is damaged, or its pickle holds more than a dictionary of tensors (of which nothing is run); "
            "fetch it again, or convert it to safetensors"
        ) from error
    if not is_plain:
        raise WeightError(f"{file} holds more than plain tensors on the CPU; save the model's state_dict() alone")
    return tensors


def _is_plain(tensor: Any) -> bool:
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and tensor.device.type == "cpu"
    )


class _Shard:
    """A file that is mapped into memory while it is read, and mapped anew now and then: pages that
    were read would count as this process's memory for as long as their map."""

    def __init__(self, file: Path, open_file: Callable[[], Reader]) -> None:
        self._file = file
        self._open = open_file
        self._read: Reader | None = None
        self._bytes = 0

    def load(self, name: str) -> torch.Tensor:
        """A view of the map, which it keeps alive."""
        if self._read is None:
            self._read, self._bytes = self._open(), 0
        tensor = self._read(name).detach()  # a pickled parameter would make whatever it is copied to require gradients
        self._bytes += tensor.nbytes
        if self._bytes > _MAPPED_BYTES:
            self._read = None
        return tensor
