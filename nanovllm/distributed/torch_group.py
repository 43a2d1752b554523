"""Sums and gathers by torch.distributed: between hosts, between GPUs, and where there are no native kernels."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nanovllm.errors import PeerLost


class GlooCommunicator:
    """Between CPUs. Sums are made of what was gathered, as gloo's own have no fixed order."""

    def __init__(self, store: Any, rank: int, size: int, timeout_s: float, address: str | None = None) -> None:
        """address: of this host; default what its name stands for, or GLOO_SOCKET_IFNAME, which goes first."""
        self._rank, self._size = rank, size
        timeout = timedelta(seconds=timeout_s)
        if address is None or "GLOO_SOCKET_IFNAME" in os.environ:
            self._backend: Any = dist.ProcessGroupGloo(store, rank, size, timeout)
            return
        gloo: Any = dist.ProcessGroupGloo  # its stubs know neither
        options = gloo._Options()
        options._timeout = timeout
        options._devices = [gloo.create_device(hostname=address)]
        self._backend = dist.ProcessGroupGloo(store, rank, size, options)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """In fp32, rounded once."""
        return functools.reduce(torch.add, (part.float() for part in self._gather(x))).to(x.dtype)

    def gather(self, x: torch.Tensor, width: int | None = None, *, root: int | None = None) -> torch.Tensor:
        parts = self._gather(x)
        return _side_by_side(parts, width) if root in (None, self._rank) else x[:, :0]

    def close(self) -> None:
        self._backend = None

    def _gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self._size)]
        if self._backend is None:
            raise PeerLost
        try:
            self._backend.allgather([parts], [x]).wait()
        except RuntimeError as error:
            raise PeerLost from error
        return parts


class NCCLCommunicator:
    """Between GPUs. NCCL adds in an order of its own, which is the same for the same ranks and sizes."""

    def __init__(self, store: Any, rank: int, size: int, device: torch.device, timeout_s: float) -> None:
        self._rank, self._size = rank, size
        torch.cuda.set_device(device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)
        self._backend: Any = dist.ProcessGroupNCCL(store, rank, size, options)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        self._backend.allreduce([out]).wait()
        return out

    def gather(self, x: torch.Tensor, width: int | None = None, *, root: int | None = None) -> torch.Tensor:
        parts = x.new_empty(self._size, *x.shape)
        self._backend._allgather_base(parts, x.contiguous()).wait()
        return _side_by_side(parts.unbind(), width) if root in (None, self._rank) else x[:, :0]

    def close(self) -> None:
        self._backend.abort()


def _side_by_side(parts: Sequence[torch.Tensor], width: int | None) -> torch.Tensor:
    return torch.cat(list(parts), dim=-1)[:, :width].contiguous()
