"""Rotary position embedding of heads (Su et al. 2021), and the norm that some models put before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.variant import AMPERE_ON, CHIPS, Variant, launch_options

_WARPS = 4


@triton.jit
def rotate_heads(
    x, out, weight, cos, sin, token, block, heads, token_stride, head_stride, angle_stride, eps,
    SIZE: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Heads number `block` of a token, HEADS of them: the pairs (i, i + HALF), and the rest of SIZE as it is."""
    head = block * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, WIDTH)
    known = (head < heads)[:, None]
    mask = known & (column < HALF)[None, :]
    source = x + token * token_stride + head[:, None] * head_stride
    first = tl.load(source + column[None, :], mask, 0.0).to(tl.float32)
    second = tl.load(source + HALF + column[None, :], mask, 0.0).to(tl.float32)
    beyond = 2 * HALF + tl.arange(0, REST_WIDTH)
    rest_mask = known & (beyond < SIZE)[None, :]
    rest = tl.zeros((HEADS, REST_WIDTH), tl.float32)
    if 2 * HALF < SIZE:
        rest = tl.load(source + beyond[None, :], rest_mask, 0.0).to(tl.float32)
    if weight is not None:
        squares = tl.sum(first * first + second * second, 1) + tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / SIZE + eps)[:, None]
        first *= scale * tl.load(weight + column, column < HALF, 0.0).to(tl.float32)[None, :]
        second *= scale * tl.load(weight + HALF + column, column < HALF, 0.0).to(tl.float32)[None, :]
        rest *= scale * tl.load(weight + beyond, beyond < SIZE, 0.0).to(tl.float32)[None, :]
    c = tl.load(cos + token * angle_stride + column, column < HALF, 0.0)[None, :]
    s = tl.load(sin + token * angle_stride + column, column < HALF, 0.0)[None, :]
    target = out + (token * heads + head[:, None]) * SIZE
    tl.store(target + column[None, :], (first * c - second * s).to(out.dtype.element_ty), mask)
    tl.store(target + HALF + column[None, :], (second * c + first * s).to(out.dtype.element_ty), mask)
    if 2 * HALF < SIZE:
        tl.store(target + beyond[None, :], rest.to(out.dtype.element_ty), rest_mask)


@triton.jit
def rotate_kernel(
    x, out, cos, sin, heads, token_stride, head_stride, angle_stride,
    SIZE: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rotate_heads(
        x, out, None, cos, sin, token, block, heads, token_stride, head_stride, angle_stride, 0.0,
        SIZE, HALF, WIDTH, REST_WIDTH, HEADS,
    )  # fmt: skip


@triton.jit
def norm_and_rotate_kernel(
    q, k, q_out, k_out, q_weight, k_weight, cos, sin, q_heads, k_heads,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, angle_stride, eps,
    SIZE: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """A token's first programs have its queries, the others its keys."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q_blocks = tl.cdiv(q_heads, HEADS)
    if block < q_blocks:
        rotate_heads(
            q, q_out, q_weight, cos, sin, token, block, q_heads, q_token_stride, q_head_stride, angle_stride, eps,
            SIZE, HALF, WIDTH, REST_WIDTH, HEADS,
        )  # fmt: skip
    else:
        rotate_heads(
            k, k_out, k_weight, cos, sin, token, block - q_blocks, k_heads, k_token_stride, k_head_stride,
            angle_stride, eps, SIZE, HALF, WIDTH, REST_WIDTH, HEADS,
        )  # fmt: skip


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads x [T, H, D] by cos and sin [T, 1, R / 2], both of one stride -> [T, H, D], contiguous."""
    x = _readable(x)
    tokens, heads, size = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if tokens and heads:
        sizes = _shape(size, cos.shape[-1])
        grid = tokens, triton.cdiv(heads, sizes["HEADS"])
        strides = x.stride(0), x.stride(1), _angle_stride(cos, sin)
        rotate_kernel[grid](x, out, cos, sin, heads, *strides, **sizes, **launch_options(_WARPS))
    return out


def norm_and_rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [T, H, D] and keys [T, KH, D], each head's RMSNorm first; nothing is rounded between the two."""
    q, k = _readable(q), _readable(k)
    outs = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if len(q):
        sizes = _shape(q.shape[2], cos.shape[-1])
        heads = q.shape[1], k.shape[1]
        grid = len(q), sum(triton.cdiv(count, sizes["HEADS"]) for count in heads)
        strides = q.stride(0), q.stride(1), k.stride(0), k.stride(1), _angle_stride(cos, sin)
        norm_and_rotate_kernel[grid](
            q, k, *outs, q_weight, k_weight, cos, sin, *heads, *strides, eps, **sizes, **launch_options(_WARPS)
        )
    return outs


def _shape(size: int, half: int) -> dict[str, int]:
    """By a head's size alone: about 1024 numbers a program, eight a thread."""
    width, rest = triton.next_power_of_2(half), size - 2 * half
    rest_width = triton.next_power_of_2(max(1, rest))
    heads = max(1, 1024 // (2 * width + rest_width * (rest > 0)))
    heads = 1 << heads.bit_length() - 1
    return {"SIZE": size, "HALF": half, "WIDTH": width, "REST_WIDTH": rest_width, "HEADS": heads}


def _readable(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _angle_stride(cos: torch.Tensor, sin: torch.Tensor) -> int:
    assert cos.stride(0) == sin.stride(0) and cos.stride(-1) == sin.stride(-1) == 1
    return cos.stride(0)


def variants() -> list[Variant]:
    found = []
    for dtype, weight, size, half in (
        *(("fp32", "fp32", 256, 128), ("bf16", "bf16", 128, 64), ("bf16", "fp32", 256, 128)),
        *(("fp16", "fp16", 80, 16), ("fp16", "fp32", 80, 40)),
    ):
        strides = "i32:16" if half % 16 == 0 else "i32"
        types = {**dict.fromkeys(("cos", "sin"), "*fp32:16"), "angle_stride": strides}
        one = {"x": f"*{dtype}:16", "out": f"*{dtype}:16", "heads": "i32"}
        one |= dict.fromkeys(("token_stride", "head_stride"), "i32:16")
        two = dict.fromkeys(("q", "k", "q_out", "k_out"), f"*{dtype}:16") | {"eps": "fp32"}
        two |= dict.fromkeys(("q_weight", "k_weight"), f"*{weight}:16") | dict.fromkeys(("q_heads", "k_heads"), "i32")
        two |= dict.fromkeys(("q_token_stride", "q_head_stride", "k_token_stride", "k_head_stride"), "i32:16")
        chips = AMPERE_ON if dtype == "bf16" else CHIPS
        found.append(Variant(rotate_kernel, types | one, _shape(size, half), _WARPS, chips=chips))
        found.append(Variant(norm_and_rotate_kernel, types | two, _shape(size, half), _WARPS, chips=chips))
    return found
