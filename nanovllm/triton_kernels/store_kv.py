"""Keys and values of a step into their pages."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.kv_codes import cache_arguments, encode, head_sizes, scales_begin
from nanovllm.triton_kernels.variant import AMPERE_ON, CHIPS, Variant, launch_options

_ROWS = 8  # heads of tokens that a program moves


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def store_kv_kernel(
    k,  # [T, KH, D]
    v,
    kv,  # as in `cache_arguments`
    scales,
    slots,  # [T] int64
    num_rows,  # T * KH
    num_slots,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    half_stride,
    page_stride,
    kv_heads,
    CODES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens, heads = (rows // kv_heads).to(tl.int64), rows % kv_heads
    # a row that pads a batch may name no slot at all
    slot = tl.load(slots + tokens, mask=rows < num_rows, other=-1)
    wanted = (slot >= 0) & (slot < num_slots)
    columns = tl.arange(0, WIDTH)[None, :]
    mask = wanted[:, None] & (columns < HEAD_DIM)
    keys = tl.load(k + (tokens * k_token_stride + heads * k_head_stride)[:, None] + columns, mask=mask, other=0.0)
    values = tl.load(v + (tokens * v_token_stride + heads * v_head_stride)[:, None] + columns, mask=mask, other=0.0)
    page, place = slot // BLOCK_SIZE, slot % BLOCK_SIZE * kv_heads + heads
    if CODES != "none":
        keys, of_keys = encode(keys.to(tl.float32))
        values, of_values = encode(values.to(tl.float32))
        scales += page * (page_stride // 4) + scales_begin(kv_heads, BLOCK_SIZE, HEAD_DIM) + place
        tl.store(scales, of_keys, mask=wanted)
        tl.store(scales + half_stride // 4, of_values, mask=wanted)
    places = kv + (page * page_stride + place * HEAD_DIM)[:, None] + columns
    tl.store(places, keys.to(kv.dtype.element_ty), mask=mask)
    tl.store(places + half_stride, values.to(kv.dtype.element_ty), mask=mask)


def store_kv(k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor) -> None:
    """k, v: [T, KH, D], last dimension contiguous. kv: as in `cache_arguments`.

    slots: [T] int64; a slot below 0 or beyond the cache is not written.
    Designed against the floor of memory: each number is read once and written once. Not measured yet.
    """
    tokens, heads, _ = k.shape
    assert k.stride(2) == v.stride(2) == 1 and kv.is_contiguous()
    store_kv_kernel[(triton.cdiv(tokens * heads, _ROWS),)](
        k=k,
        v=v,
        slots=slots,
        num_rows=tokens * heads,
        num_slots=kv.shape[1] * kv.shape[2],
        k_token_stride=k.stride(0),
        k_head_stride=k.stride(1),
        v_token_stride=v.stride(0),
        v_head_stride=v.stride(1),
        ROWS=_ROWS,
        **cache_arguments(kv),
        **launch_options(num_warps=4),
    )


def variants() -> list[Variant]:
    strides = ("k_token_stride", "k_head_stride", "v_token_stride", "v_head_stride", "page_stride")
    found = []
    kinds = [("fp32", "fp16"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16")]
    for given, kept in (*kinds, *((given, "u8") for given in ("bf16", "fp16", "fp32"))):
        for head_dim in (256, 128, 80):
            types = {
                **dict.fromkeys(("k", "v"), f"*{given}:16"),
                **dict.fromkeys(("num_rows", "num_slots", "kv_heads"), "i32"),
                **dict.fromkeys(strides, "i32:16"),
                "kv": f"*{kept}:16",
                "slots": "*i64:16",
                "half_stride": "i64:16",
            }
            codes = kept == "u8"
            sizes: dict[str, Any] = {"CODES": "computed" if codes else "none", "BLOCK_SIZE": 16, "ROWS": _ROWS}
            sizes |= head_sizes(head_dim)
            if codes:
                types["scales"] = "*fp32:16"
            else:
                sizes["scales"] = None
            chips = AMPERE_ON if codes or "bf16" in (given, kept) else CHIPS
            found.append(Variant(store_kv_kernel, types, sizes, chips=chips))
    return found
