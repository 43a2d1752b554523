"""What a Mamba2 layer is between its two projections: its sizes and its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

SumOverRanks = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Mamba2Sizes:
    """num_groups: of heads that share B and C. time_step_limit: of dt, after the softplus. whole_norm_size: of the
    one group, where the others of its channels lie on other ranks."""

    hidden_size: int
    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    conv_kernel: int
    rms_norm_eps: float
    conv_bias: bool = True
    proj_bias: bool = False
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    whole_norm_size: int | None = None

    @property
    def inner_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_size(self) -> int:
        return self.inner_size + 2 * self.num_groups * self.state_size

    @property
    def norm_size(self) -> int:
        return self.whole_norm_size or self.inner_size // self.num_groups

    @property
    def in_proj_shards(self) -> dict[str | None, int]:
        """Rows of the input projection, in its order."""
        shared = self.num_groups * self.state_size
        return {"gate": self.inner_size, "x": self.inner_size, "B": shared, "C": shared, "dt": self.num_heads}


@dataclass(frozen=True, slots=True)
class Mamba2Weights:
    """In fp32, contiguous."""

    sizes: Mamba2Sizes
    filters: torch.Tensor  # [conv_kernel, conv_size], of the oldest token first
    conv_bias: torch.Tensor  # [conv_size]
    A: torch.Tensor  # [num_heads], negative
    D: torch.Tensor  # [num_heads]
    dt_bias: torch.Tensor  # [num_heads]
    norm: torch.Tensor  # [inner_size]
