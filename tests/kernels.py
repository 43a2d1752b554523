"""What tests of kernels share: random rows, and the native library at each of its levels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from nanovllm.ops.library import Library, library_or_reason


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def native_library() -> Library:
    """Where it was not built, the module that asks for it is skipped."""
    library = library_or_reason()
    if not isinstance(library, Library):
        pytest.skip(library, allow_module_level=True)
    return library


@contextmanager
def at_level(name: str) -> Iterator[bool]:
    """Whether this processor has the level; while the context lasts, kernels run on it."""
    library = native_library()
    before = library.level
    supported = library.set_level(name)
    try:
        yield supported
    finally:
        library.set_level(before)
