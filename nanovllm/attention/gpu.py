"""What the backends for NVIDIA GPUs share: where they run, and how keys and values get into pages."""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F

from nanovllm.attention.codes import codes_reason
from nanovllm.batch import Batch
from nanovllm.cache_spec import PagedKVSpec


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def gpu_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"runs on NVIDIA GPUs, not on {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0, and this GPU has {'.'.join(map(str, capability))}"
    return None


def flash_reason(dtype: torch.dtype, spec: PagedKVSpec) -> str | None:
    """What FlashAttention's own kernels cannot do, in every version."""
    if reason := codes_reason(spec.codes):
        return reason
    if dtype not in (torch.bfloat16, torch.float16):
        return f"has no kernels for {dtype}; set attention_backend='triton'"
    if spec.head_dim % 8 or spec.head_dim > 256:
        return f"takes head sizes up to 256 in steps of 8, not {spec.head_dim}; set attention_backend='triton'"
    return "has no ALiBi as this model needs it; set attention_backend='triton'" if spec.alibi else None


def paged_shape(spec: PagedKVSpec, num_blocks: int, block_size: int) -> tuple[int, ...]:
    return (2, num_blocks, block_size, spec.num_kv_heads, spec.row)


def store(k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, batch: Batch) -> None:
    if has_triton():
        from nanovllm.triton_kernels.store_kv import store_kv

        store_kv(side_by_side(k), side_by_side(v), kv, batch.slot_mapping)
    else:
        for half, x in zip(kv.flatten(1, 2), (k, v), strict=True):
            half.index_copy_(0, batch.slot_mapping, x.to(kv.dtype))


def side_by_side(x: torch.Tensor) -> torch.Tensor:
    """Numbers of a head stand side by side; heads and tokens may lie apart."""
    return x if x.stride(2) == 1 else x.contiguous()


def key_starts(batch: Batch) -> torch.Tensor:
    """int32 [B + 1]: sums of the lengths of the sequences before each."""
    return F.pad(batch.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
