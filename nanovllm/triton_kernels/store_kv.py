"""Keys and values of a step into their pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.variant import AMPERE_ON, CHIPS, Variant, launch_options

_ROWS = 8  # heads of tokens that a program moves


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def store_kv_kernel(
    k,  # [T, KH, D]
    v,
    kv,  # [2, blocks, block_size, KH, D]
    slots,  # [T] int64
    num_rows,  # T * KH
    num_slots,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    half_stride,
    kv_heads,
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
    keys = tl.load(k + (tokens * k_token_stride + heads * k_head_stride)[:, None] + columns, mask=mask)
    values = tl.load(v + (tokens * v_token_stride + heads * v_head_stride)[:, None] + columns, mask=mask)
    places = kv + ((slot * kv_heads + heads) * HEAD_DIM)[:, None] + columns
    tl.store(places, keys.to(kv.dtype.element_ty), mask=mask)
    tl.store(places + half_stride, values.to(kv.dtype.element_ty), mask=mask)


def store_kv(k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor) -> None:
    """k, v: [T, KH, D], last dimension contiguous. kv: [2, blocks, block_size, KH, D], contiguous.

    slots: [T] int64; a slot below 0 or beyond the cache is not written.
    Designed against the floor of memory: each number is read once and written once. Not measured yet.
    """
    tokens, heads, head_dim = k.shape
    assert k.stride(2) == v.stride(2) == 1 and kv.is_contiguous()
    store_kv_kernel[(triton.cdiv(tokens * heads, _ROWS),)](
        *(k, v, kv, slots, tokens * heads, kv.shape[1] * kv.shape[2]),
        *(k.stride(0), k.stride(1), v.stride(0), v.stride(1), kv.stride(0), heads),
        **_sizes(head_dim),
        **launch_options(num_warps=4),
    )


def _sizes(head_dim: int) -> dict[str, int]:
    return {"HEAD_DIM": head_dim, "WIDTH": triton.next_power_of_2(head_dim), "ROWS": _ROWS}


def variants() -> list[Variant]:
    strides = ("k_token_stride", "k_head_stride", "v_token_stride", "v_head_stride")
    found = []
    for given, kept in (("fp32", "fp16"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16")):
        for head_dim in (256, 128, 80):
            types = {
                **dict.fromkeys(("k", "v"), f"*{given}:16"),
                **dict.fromkeys(("num_rows", "num_slots", "kv_heads"), "i32"),
                **dict.fromkeys(strides, "i32:16"),
                "kv": f"*{kept}:16",
                "slots": "*i64:16",
                "half_stride": "i64:16",
            }
            chips = AMPERE_ON if "bf16" in (given, kept) else CHIPS
            found.append(Variant(store_kv_kernel, types, _sizes(head_dim), chips=chips))
    return found
