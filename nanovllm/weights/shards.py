"""Weight files of Hugging Face directories: safetensors, and PyTorch's pickles without their code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nanovllm.errors import WeightError
from nanovllm.weights.tensor_source import LazyTensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAPPED_BYTES = 1 << 28  # of a file at a time

Reader = Callable[[str], torch.Tensor]


def read_shard(file: Path) -> Iterator[LazyTensor]:
    """The tensors of a `.safetensors` or `.bin` file; WeightError for what is damaged or no tensor."""
    return _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)


def _safetensors(file: Path) -> Iterator[LazyTensor]:
    header = _open_safetensors(file)
    shapes = {name: tuple(header.get_slice(name).get_shape()) for name in header.keys()}  # noqa: SIM118 - not a dict
    shard = _Shard(file, lambda: _open_safetensors(file).get_tensor)
    for name, shape in shapes.items():
        yield LazyTensor(name, shape, functools.partial(shard.load, name))


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightError(f"{file} is damaged ({error}); fetch it again") from error


def _pickled(file: Path) -> Iterator[LazyTensor]:
    """Mapped where the format allows it. What PyTorch wrote before 1.6 is read as a whole, and each
    tensor then goes as soon as it was used."""
    is_mapped = _is_zip(file)
    tensors = _unpickle(file, mmap=is_mapped)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not is_mapped:
        for name, shape in shapes.items():
            yield LazyTensor(name, shape, functools.partial(_as_floats, file, name, tensors.pop(name)))
        return
    del tensors
    shard = _Shard(file, lambda: _unpickle(file, mmap=True).__getitem__)
    for name, shape in shapes.items():
        yield LazyTensor(name, shape, functools.partial(shard.load, name))


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
        tensor = _as_floats(self._file, name, self._read(name))
        self._bytes += tensor.nbytes
        if self._bytes > _MAPPED_BYTES:
            self._read = None
        return tensor


def _as_floats(file: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in _FLOATS:
        raise WeightError(f"{file}: the tensor {name} is {tensor.dtype}; weights must be floats of 16, 32 or 64 bits")
    return tensor.detach()  # a pickled parameter would make whatever it is copied to require gradients
