"""Keys and values of a step into their pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.variant import AMPERE_ON, CHIPS, Variant, launch_options


@triton.jit
def store_kv_kernel(
    k,  # [T, KH, D]
    v,
    kv,  # [2, blocks, block_size, KH, D]
    slots,  # [T] int64
    num_slots,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    kv_heads,
    half_stride,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + token)
    column = tl.arange(0, WIDTH)
    # a padded row of a graph may name no slot at all
    mask = (column < HEAD_DIM) & (slot >= 0) & (slot < num_slots)
    keys = tl.load(k + token * k_token_stride + head * k_head_stride + column, mask)
    values = tl.load(v + token * v_token_stride + head * v_head_stride + column, mask)
    target = kv + (slot * kv_heads + head) * HEAD_DIM + column
    tl.store(target, keys.to(kv.dtype.element_ty), mask)
    tl.store(target + half_stride, values.to(kv.dtype.element_ty), mask)


def store_kv(k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor) -> None:
    """k, v: [T, KH, D], last dimension contiguous. kv: [2, blocks, block_size, KH, D], contiguous.

    slots: [T] int64; a slot below 0 or beyond the cache is not written.
    Reads each number once and writes it once: memory is what bounds it.
    """
    (tokens, heads, head_dim), half = k.shape, kv.stride(0)
    if tokens == 0:
        return
    assert k.stride(2) == v.stride(2) == 1 and kv.is_contiguous()
    store_kv_kernel[(tokens, heads)](
        *(k, v, kv, slots, kv.shape[1] * kv.shape[2]),
        *(k.stride(0), k.stride(1), v.stride(0), v.stride(1), heads, half),
        HEAD_DIM=head_dim,
        WIDTH=triton.next_power_of_2(head_dim),
        **launch_options(num_warps=1),
    )


def variants() -> list[Variant]:
    strides = ("k_token_stride", "k_head_stride", "v_token_stride", "v_head_stride")
    return [
        Variant(
            store_kv_kernel,
            {
                **dict.fromkeys(("k", "v"), f"*{wide}:16"),
                "kv": f"*{dtype}:16",
                "slots": "*i64:16",
                "num_slots": "i32:16",
                **dict.fromkeys(strides, "i32:16"),
                "kv_heads": "i32",
                "half_stride": "i64:16",
            },
            {"HEAD_DIM": head_dim, "WIDTH": triton.next_power_of_2(head_dim)},
            num_warps=1,
            chips=AMPERE_ON if "bf16" in (wide, dtype) else CHIPS,
        )
        for wide, dtype in (("fp32", "fp16"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16"))
        for head_dim in (80, 128, 256)
    ]
