"""How a process becomes a rank of a group."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch

from nanovllm.distributed.group import TPGroup


def join_group(rank: int, size: int, *, init_method: str, device: torch.device, timeout_s: float) -> TPGroup:
    """Wait until all ranks are here. init_method: as torch.distributed's: "file:///..." or "env://"."""
    dist: Any = torch.distributed
    if size > 1:
        store, _, _ = next(dist.rendezvous(init_method, rank, size, timeout=timedelta(seconds=timeout_s)))
        store.set(f"here/{rank}", "")
        store.wait([f"here/{other}" for other in range(size)], timedelta(seconds=timeout_s))
    return TPGroup(rank, size)
