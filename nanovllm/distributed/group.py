"""TPGroup: the ranks that hold one model's shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from nanovllm.errors import ConfigError


class Communicator(Protocol):
    """What ranks do together: all of them, in the same order, with tensors of the same shape.

    PeerLost where one does not take part in time; the communicator is of no use then.
    """

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in x's dtype: the same bits on all ranks and in all runs. On CPUs its terms
        are added in the order of the ranks."""
        ...

    def gather(self, x: torch.Tensor, width: int | None = None, *, root: int | None = None) -> torch.Tensor:
        """[R, n] of each rank -> [R, size * n] in the order of the ranks, or the first `width` columns of that.

        root: the rank that gets it, the others get [R, 0]; None: all get it."""
        ...

    def close(self) -> None:
        """Leave: whoever waits for this rank learns it at once where the ranks share memory. Harmless when repeated."""
        ...


@dataclass(frozen=True, slots=True)
class TPGroup:
    """Tensor-parallel group (Shoeybi et al. 2019) as layers see it: who am I, of how many.

    comm: None for one rank, and where a rank is only measured.
    """

    rank: int = 0
    size: int = 1
    comm: Communicator | None = None

    def shard(self, total: int, what: str) -> int:
        """This rank's share of `total` things; ConfigError where they do not divide."""
        if total % self.size:
            sizes = [n for n in range(1, min(total, 64) + 1) if total % n == 0]
            raise self._refusal(total, what, sizes)
        return total // self.size

    def part(self, total: int, what: str, group: int = 1) -> slice:
        """Which ones of `total` things this rank has; ConfigError where they do not divide into whole groups."""
        count = self.shard(total, what)
        if count % group and self.size > 1:
            sizes = [n for n in range(1, min(total, 64) + 1) if n == 1 or (total % n == 0 and total // n % group == 0)]
            raise self._refusal(total, f"{what} in groups of {group}", sizes)
        return slice(self.rank * count, (self.rank + 1) * count)

    def uneven_part(self, total: int, what: str) -> slice:
        """The same, but where they do not divide some ranks have one more; ConfigError where one would have none."""
        if total < self.size:
            raise ConfigError(f"{what}: {total} are too few for tensor_parallel_size={self.size}")
        return slice(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def part_or_copy(self, total: int, what: str) -> slice:
        """The same, but where there are fewer things than ranks, neighbouring ranks have one and the same."""
        if total >= self.size:
            return self.part(total, what)
        if self.size % total:
            sizes = [n for n in range(1, total) if total % n == 0]
            raise self._refusal(total, what, [*sizes, *range(total, 5 * total, total)])
        mine = self.rank * total // self.size
        return slice(mine, mine + 1)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' x."""
        return x if self.comm is None else self.comm.all_reduce(x)

    def gather(self, x: torch.Tensor, width: int, *, root: int | None = None) -> torch.Tensor:
        """The ranks' x [R, n] side by side, cut to `width` columns: what lies behind is padding. root: the rank
        that gets it, the others get [R, 0]; None: all get it."""
        return x if self.comm is None else self.comm.gather(x, width, root=root)

    def _refusal(self, total: int, what: str, sizes: list[int]) -> ConfigError:
        return ConfigError(
            f"{what}: {total} does not divide by tensor_parallel_size={self.size}; "
            f"sizes that can: {', '.join(map(str, sizes))}"
        )
