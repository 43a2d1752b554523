"""BuildContext: what constructors need to know of their surroundings, passed explicitly."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from nanovllm.attention.base import AttentionBackend
from nanovllm.distributed.group import TPGroup


@dataclass(frozen=True, slots=True)
class BuildContext:
    """Construction-time twin of Batch: given to every model and layer constructor.

    max_model_len: positions that rotary tables must cover.
    """

    device: torch.device
    dtype: torch.dtype
    attention: AttentionBackend
    max_model_len: int
    tp: TPGroup = field(default_factory=TPGroup)
