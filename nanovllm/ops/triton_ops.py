"""Ops of triton_kernels/: GPUs, with cuBLAS for the matrix products."""

from __future__ import annotations

import torch

from nanovllm.ops.torch_ops import TorchOps


class TritonOps(TorchOps):
    """torch's operations, but for those that a kernel of ours does in one launch instead of several."""

    name = "triton"

    def packs(self, device: torch.device, dtype: torch.dtype) -> bool:
        return False
