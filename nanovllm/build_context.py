"""BuildContext: what constructors need to know of their surroundings, passed explicitly."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from nanovllm.distributed.group import TPGroup
from nanovllm.ops.base import Ops
from nanovllm.ops.torch_ops import TorchOps


@dataclass(frozen=True, slots=True)
class BuildContext:
    """Construction-time twin of Batch: given to every model and layer constructor.

    dtype: of weights, and of cached keys and values if these are not quantised.
    max_model_len: positions that rotary tables must cover.
    ops: the kernels that layers compute with.
    quantization: of linear layers' weights: "int8", "int4", "gguf" as the file has them, or None.
    kv_codes: what cached keys and values are quantised to, or None (PagedKVSpec.codes).
    expert_parallel: whether the ranks divide a mixture's experts among them, instead of each expert's rows.
    """

    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    tp: TPGroup = field(default_factory=TPGroup)
    ops: Ops = field(default_factory=TorchOps)
    expert_parallel: bool = False
    quantization: str | None = None
    kv_codes: torch.dtype | None = None

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Of what flows between layers."""
        return self.ops.hidden_dtype(self.dtype)
