"""Keys and values as e4m3 codes in pages, beside the fp32 scale of each token and head.

Half a page has the codes [block_size, KH, D] of all its tokens, one byte each, then their scales [block_size, KH].
Codes are made by whole-number arithmetic, and so they are read, but for chips that have an instruction: "computed" and
"converted" in the constexpr CODES, which is "none" where pages hold keys and values as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)
_LEAST = tl.constexpr(1e-30)  # smaller magnitudes count as zeros
_SCALE_BYTES = 4


def cache_arguments(kv: torch.Tensor) -> dict[str, Any]:
    """Of every kernel that sees pages [2, blocks, block_size, KH, D], contiguous, or with codes [..., D + 4] of
    float8_e4m3fn."""
    _, _, block_size, kv_heads, row = kv.shape
    codes = kv.dtype == torch.float8_e4m3fn
    as_bytes = kv.view(torch.uint8)
    return {
        "kv": as_bytes if codes else kv,
        "scales": as_bytes.flatten().view(torch.float32) if codes else None,
        "half_stride": kv.stride(0),
        "page_stride": kv.stride(1),
        "kv_heads": kv_heads,
        "CODES": codes_on(kv.device) if codes else "none",
        "BLOCK_SIZE": block_size,
        **head_sizes(row - _SCALE_BYTES if codes else row),
    }


def codes_on(device: torch.device) -> str:
    """How such a chip reads codes."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return "converted" if fast else "computed"


def head_sizes(head_dim: int) -> dict[str, int]:
    return {"HEAD_DIM": head_dim, "WIDTH": triton.next_power_of_2(head_dim)}


@triton.jit
def scales_begin(kv_heads, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where in half a page the scales begin; all places of scales are in numbers of fp32."""
    return BLOCK_SIZE * kv_heads * HEAD_DIM // 4


@triton.jit
def encode(x):
    """fp32 [M, N] -> codes [M, N], uint8, and scales [M] of its rows: the nearest codes, ties to even."""
    largest = tl.max(tl.abs(x), 1)
    x = x * tl.div_rn(LARGEST, tl.maximum(largest, _LEAST))[:, None]
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (127 - 7) * 8
    # below 2^-6 codes are multiples of 2^-9, as fp32 is from 2^14 on
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.minimum(tl.where(tl.abs(x) < 0.015625, small, normal), 0x7E)
    return (code | sign).to(tl.uint8), tl.div_rn(largest, LARGEST)


@triton.jit
def decode(codes, dtype: tl.constexpr, CODES: tl.constexpr):
    """What the codes stand for; over 2^8 if it is computed, as the exponents of fp16 have an offset so much larger."""
    if CODES == "converted":
        found = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        bits = codes.to(tl.uint16)
        found = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    if dtype != tl.float16:  # by way of fp32, from which two at once become bfloat16
        found = found.to(tl.float32).to(dtype)
    return found


@triton.jit
def load_scales(
    scales,
    half_stride,
    page_stride,
    kv_heads,
    pages,
    start,
    end,
    seen_from,
    WINDOWED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CODES: tl.constexpr,
):
    """fp32 [BLOCK_N] of keys and of values start.., times the 2^8 that `decode` may leave out; 0 from `end` on, and
    before `seen_from` if WINDOWED.

    scales: at this KV head. pages: of each key, or the one of all."""
    keys = start + tl.arange(0, BLOCK_N)
    places = scales + pages.to(tl.int64) * (page_stride // 4) + keys % BLOCK_SIZE * kv_heads
    there = keys < end
    if WINDOWED:
        there &= keys >= seen_from
    of_keys = tl.load(places, mask=there, other=0.0)
    of_values = tl.load(places + half_stride // 4, mask=there, other=0.0)
    if CODES == "computed":
        of_keys *= 256.0
        of_values *= 256.0
    return of_keys, of_values
