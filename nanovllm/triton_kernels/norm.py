"""Norms of rows, statistics in fp32. What bounds them is reading each number once and writing it once."""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.variant import AMPERE_ON, CHIPS, Variant, launch_options


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x, weight, out, rows, inner, outer_stride, inner_stride, eps,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """WIDTH: the power of two that holds SIZE. ROWS: of a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < SIZE)[None, :]
    start = row // inner * outer_stride + row % inner * inner_stride
    values = tl.load(x + start[:, None] + column[None, :], mask, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1) / SIZE + eps)
    factors = tl.load(weight + column, column < SIZE, 0.0).to(tl.float32)
    normed = values * scale[:, None] * factors[None, :]
    tl.store(out + row[:, None] * SIZE + column[None, :], normed.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(
    x, weight, bias, out, rows, inner, outer_stride, inner_stride, eps,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """bias: or None."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < SIZE)[None, :]
    start = row // inner * outer_stride + row % inner * inner_stride
    values = tl.load(x + start[:, None] + column[None, :], mask, 0.0).to(tl.float32)
    mean = tl.sum(values, 1) / SIZE
    centred = tl.where(mask, values - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / SIZE + eps)
    normed = centred * scale[:, None] * tl.load(weight + column, column < SIZE, 0.0).to(tl.float32)[None, :]
    if bias is not None:
        normed += tl.load(bias + column, column < SIZE, 0.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * SIZE + column[None, :], normed.to(out.dtype.element_ty), mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., size], size at most 16384; weight [size] of any dtype."""
    x, out = _readable(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, inner, *strides = _rows(x)
    if rows:
        sizes, options = _shape(x.shape[-1])
        grid = (triton.cdiv(rows, sizes["ROWS"]),)
        rms_norm_kernel[grid](x, weight, out, rows, inner, *strides, eps, **sizes, **options)
    return out


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The same, for bias [size] or None."""
    x, out = _readable(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, inner, *strides = _rows(x)
    if rows:
        sizes, options = _shape(x.shape[-1])
        grid = (triton.cdiv(rows, sizes["ROWS"]),)
        layer_norm_kernel[grid](x, weight, bias, out, rows, inner, *strides, eps, **sizes, **options)
    return out


def _shape(size: int) -> tuple[dict[str, int], dict[str, int]]:
    """By the size alone, as a row's bits depend on it: eight numbers a thread, in 16 warps at most, and several
    rows a program where they are short."""
    assert size <= 16384
    width = triton.next_power_of_2(size)
    rows = max(1, 1024 // width)
    sizes = {"SIZE": size, "WIDTH": width, "ROWS": rows}
    return sizes, launch_options(num_warps=min(max(1, rows * width // 256), 16))


def _readable(x: torch.Tensor) -> torch.Tensor:
    """As it is if it is rows, or rows of heads, with whole strides."""
    return x if x.dim() in (2, 3) and x.stride(-1) == 1 else x.contiguous()


def _rows(x: torch.Tensor) -> tuple[int, int, int, int]:
    """How many, how many lie in each outer one, and the strides of outer and inner ones."""
    if x.dim() == 3:
        return x.shape[0] * x.shape[1], x.shape[1], x.stride(0), x.stride(1)
    size = x.shape[-1]
    return x.numel() // size, 1, x.stride(0) if x.dim() == 2 else size, 0


def variants() -> list[Variant]:
    """Rows of each number of warps, those of heads the last. Weights have the rows' dtype, or fp32."""
    made = []
    for (dtype, chips), size in itertools.product(
        (("fp32", CHIPS), ("bf16", AMPERE_ON), ("fp16", CHIPS)), (16384, 2048, 577, 128)
    ):
        sizes, options = _shape(size)
        whole = ":16" if size % 16 == 0 else ""
        types = {
            **dict.fromkeys(("x", "out"), f"*{dtype}:16"),
            "weight": "*fp32:16" if size in (2048, 128) else f"*{dtype}:16",
            "rows": "i32",
            "outer_stride": f"i32{whole}",
            "inner_stride": "i32:16",
            "eps": "fp32",
        }
        heads: dict[str, str] = {"inner": "i32"} if size == 128 else {}
        constants: dict[str, int | None] = {**sizes} if heads else {"inner": 1, **sizes}
        made.append(Variant(rms_norm_kernel, types | heads, constants, options["num_warps"], chips=chips))
        bias = {"bias": types["weight"]} if size != 2048 else {}
        constants = constants | ({} if bias else {"bias": None})
        made.append(Variant(layer_norm_kernel, types | heads | bias, constants, options["num_warps"], chips=chips))
    return made
