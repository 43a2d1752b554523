"""Raw: a tensor as a file has it; whether those of a quantised weight fit together, and the numbers of their words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nanovllm.errors import WeightError

HALVES = (torch.float16, torch.bfloat16)
Expected = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]
"""{last part of a tensor's name: (its shape, types that it may have)}."""


@dataclass(frozen=True, slots=True)
class Raw:
    """A tensor of a file, of whatever type. load: reads it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]


def require(module: str, parts: Mapping[str, Raw], expected: Expected) -> None:
    """WeightError unless these tensors are there and have such shapes and types."""
    for name, (shape, dtypes) in expected.items():
        raw = _typed(module, parts, name, dtypes)
        if raw.shape != shape:
            raise WeightError(f"{raw.name} is {raw.shape}, should be {shape} by the module's other tensors")


def matrix(module: str, parts: Mapping[str, Raw], name: str, dtype: torch.dtype) -> tuple[int, int]:
    """The shape of a tensor that says how large the weight is; WeightError as in `require`."""
    raw = _typed(module, parts, name, (dtype,))
    if len(raw.shape) != 2:
        raise WeightError(f"{raw.name} is {raw.shape}, should be a matrix")
    return raw.shape[0], raw.shape[1]


def _typed(module: str, parts: Mapping[str, Raw], name: str, dtypes: tuple[torch.dtype, ...]) -> Raw:
    if name not in parts:
        raise WeightError(f"{module} is quantised, but lacks {name}")
    raw = parts[name]
    if raw.dtype not in dtypes:
        raise WeightError(f"{raw.name} is {raw.dtype}; {' or '.join(map(str, dtypes))} is supported")
    return raw


def fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [..., n] -> uint8 [..., n, 32 / bits], the lowest bits first. bits: 4 or 8."""
    data = words.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))
    return data if bits == 8 else torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)


def signed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Of 8 bits, 0 to 255 -> int8 -128 to 127; of 4 bits they stay as they are."""
    return (numbers if bits == 4 else numbers ^ 128).view(torch.int8)
