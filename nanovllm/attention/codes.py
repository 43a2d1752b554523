"""Quantised keys and values: codes, times a scale of each token and head."""

from __future__ import annotations

import torch

# The dtype of the codes by EngineConfig.kv_cache_dtype; None: keys and values as they are, in the model's dtype.
KV_CODES = {"auto": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # what the largest magnitude of a token and head becomes
_LEAST = 1e-30  # smaller magnitudes count as zeros


def encode(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] -> codes [..., D] of that dtype, the nearest, ties to even; fp32 scales [...]."""
    largest = x.float().abs().amax(-1)
    # divided as the kernels do: torch makes a number over a tensor a product with the reciprocal
    factor = torch.tensor(LARGEST[dtype]) / largest.clamp(min=_LEAST)
    scaled = x.float() * factor[..., None]
    return (scaled if dtype.is_floating_point else scaled.round()).to(dtype), largest / LARGEST[dtype]


def split_pages(kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a quantised cache [2, blocks, block_size, KH, D + 4] of bytes: its codes [2, blocks, block_size, KH, D]
    and fp32 scales [2, blocks, block_size, KH]. Half a page has the codes of all its tokens, then their scales.
    """
    block_size, heads, row = kv.shape[2:]
    head_dim = row - torch.float32.itemsize
    halves = kv.flatten(2)
    codes, scales = halves.split((block_size * heads * head_dim, block_size * heads * torch.float32.itemsize), dim=2)
    return codes.unflatten(2, (block_size, heads, head_dim)), scales.view(torch.float32).unflatten(
        2, (block_size, heads)
    )


def codes_reason(codes: torch.dtype | None, *, taken: torch.dtype | None = None) -> str | None:
    """Why a backend that takes these codes alone, or none, cannot serve such a cache."""
    if codes in (None, taken):
        return None
    name = next(name for name, dtype in KV_CODES.items() if dtype == codes)
    return f"keeps no keys and values as {name}; set kv_cache_dtype='auto'"
