"""Sums and gathers between the ranks of one host, through memory that all of them have mapped."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import secrets
from typing import Any

import torch

from nanovllm.errors import PeerLost
from nanovllm.ops.library import Library

_SLOT_BYTES = 1 << 18  # of a part: two for each rank, to stay in the caches
_TOKEN_BYTES = 16


class SharedMemoryCommunicator:
    """Native calls, which a recorded step can hold like any other. Tensors of other types than fp32 are summed
    in fp32 and rounded once."""

    def __init__(self, library: Library, rank: int, size: int, store: Any, timeout_s: float) -> None:
        """store: torch.distributed's, which all ranks meet at; ConnectionError if they cannot share memory."""
        self._library, self._rank, self._size = library, rank, size
        self._store = store  # rank 0's may serve the others, who need it a little longer
        self._memory = _share_memory(library, rank, size, store)  # mapped for as long as this object lives
        self._region = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._group = (self._region, rank, size, timeout_s)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        terms = x.float().contiguous()
        out = torch.empty(terms.shape)
        status = self._library.all_reduce(
            *(*self._group, terms.data_ptr(), len(x), math.prod(x.shape[1:]), out.data_ptr()),
            torch.get_num_threads(),
        )
        if status != 0:
            raise PeerLost
        return out.to(x.dtype)

    def gather(self, x: torch.Tensor, width: int | None = None, *, root: int | None = None) -> torch.Tensor:
        x = x.contiguous()
        rows, count = x.shape
        width = count * self._size if width is None else width
        out = torch.empty(rows, width if root in (None, self._rank) else 0, dtype=x.dtype)
        status = self._library.gather_ranks(
            *(*self._group, -1 if root is None else root, x.data_ptr()),
            *(rows, count * x.itemsize, out.shape[1] * x.itemsize),
            *(out.data_ptr(), torch.get_num_threads()),
        )
        if status != 0:
            raise PeerLost
        return out

    def close(self) -> None:
        self._library.region_break(self._region)


def _share_memory(library: Library, rank: int, size: int, store: Any) -> mmap.mmap:
    """Memory that all ranks have mapped, or ConnectionError on each of them if one cannot.

    It has no name in any directory, so that nothing is left of it however the ranks end. Rank 0 says in `store`
    (torch.distributed's) where it is; a secret in it tells those who look there on another host that it is not
    the same.
    """
    mine = _create(library, size) if rank == 0 else None
    if rank == 0:
        store.set("region", "" if mine is None else mine[1])
    place = store.get("region").decode()
    mapped = mine[0] if mine is not None else _open(place)
    store.set(f"mapped/{rank}", "no" if mapped is None else "yes")
    answers = [store.get(f"mapped/{other}") for other in range(size)]
    if mine is not None:
        os.close(mine[2])
    if mapped is None or b"no" in answers:
        raise ConnectionError("not all ranks can map the same memory")
    return mapped


def _create(library: Library, size: int) -> tuple[mmap.mmap, str, int] | None:
    """The memory, where others find it, and the descriptor that keeps that place until it is closed."""
    region_bytes = library.region_bytes(size, _SLOT_BYTES)
    if not hasattr(os, "memfd_create") or region_bytes < 0:
        return None
    descriptor = os.memfd_create("nanovllm")
    os.ftruncate(descriptor, region_bytes + _TOKEN_BYTES)
    memory = mmap.mmap(descriptor, 0)
    library.region_init(ctypes.addressof(ctypes.c_char.from_buffer(memory)), _SLOT_BYTES)
    token = secrets.token_bytes(_TOKEN_BYTES)
    memory[-_TOKEN_BYTES:] = token
    return memory, f"/proc/{os.getpid()}/fd/{descriptor} {token.hex()}", descriptor


def _open(place: str) -> mmap.mmap | None:
    path, _, token = place.partition(" ")
    try:
        with open(path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
    except (OSError, ValueError):
        return None
    return memory if memory[-_TOKEN_BYTES:].hex() == token else None
