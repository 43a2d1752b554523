"""TPGroup: the ranks that hold one model's shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from nanovllm.errors import ConfigError


class Communicator(Protocol):
    """Sums and gathers over the ranks of a group."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor: ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class TPGroup:
    """Tensor-parallel group (Shoeybi et al. 2019) as layers see it: who am I, of how many."""

    rank: int = 0
    size: int = 1
    comm: Communicator | None = None

    def shard(self, total: int, what: str) -> int:
        """This rank's share of `total` rows; ConfigError when it does not divide."""
        if total % self.size:
            raise ConfigError(f"{what}: {total} does not divide by tensor_parallel_size={self.size}")
        return total // self.size
