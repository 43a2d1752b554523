"""What the engine knows of recorded steps, whoever records them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch


class CannotRecord(Exception):
    """Something in a step cannot be replayed; the message names it."""


class StepSizes(NamedTuple):
    """Of a step: its tokens, its sequences, and those of its tokens that the next one is sampled after."""

    tokens: int
    sequences: int
    sampled: int


class Graph(Protocol):
    """A recorded step."""

    def replay(self) -> None:
        """Run it, on what its input tensors hold now."""
        ...


class Recorder(Protocol):
    """Records steps that never run at the same time."""

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Graph]:
        """Write down what `run` does, without doing it. Gives the tensor that a replay fills, and that
        later replays and recordings overwrite. CannotRecord if `run` does something that cannot be replayed."""
        ...
