"""RMSNorm of y * silu(gate), each group of a row by itself: the end of a Mamba2 layer's recurrence."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.causal_conv import silu
from nanovllm.triton_kernels.variant import AMPERE_ON, CHIPS, Variant, launch_options


@triton.jit
def gated_norm_kernel(
    y,  # [T, GROUPS * SIZE]
    gate,
    stride,
    weight,
    squares,  # [T], or None
    out,
    eps,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (T, GROUPS). With `squares` only these are made, and y * silu(gate) in the place of y."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    held = column < SIZE
    column += group * SIZE
    places = y + row * (GROUPS * SIZE) + column
    x = tl.load(places, held, 0.0) * silu(tl.load(gate + row * stride + column, held, 0.0).to(tl.float32))
    total = tl.sum(x * x, 0)
    if squares is not None:
        tl.store(places, x, held)
        tl.store(squares + row, total)
    else:
        x = x * tl.rsqrt(total / SIZE + eps) * tl.load(weight + column, held, 0.0)
        tl.store(out + row * (GROUPS * SIZE) + column, x.to(out.dtype.element_ty), held)


@triton.jit
def scale_kernel(x, squares, weight, out, eps, norm_size, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (T,)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    held = column < SIZE
    scale = tl.rsqrt(tl.load(squares + row) / norm_size + eps)
    normed = tl.load(x + row * SIZE + column, held, 0.0) * scale * tl.load(weight + column, held, 0.0)
    tl.store(out + row * SIZE + column, normed.to(out.dtype.element_ty), held)


def gated_norm(y: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """y: fp32 [T, size]. gate: [T, size], in the dtype of the result. weight: fp32 [size]."""
    out = torch.empty(y.shape, dtype=gate.dtype, device=y.device)
    constants = _constants(y.shape[1] // groups)
    gated_norm_kernel[(len(y), groups)](
        y, gate, gate.stride(0), weight, None, out, eps, GROUPS=groups, **constants, **_options(constants)
    )
    return out


def gate_and_square(y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """y <- y * silu(gate); the sums of its squares, fp32 [T, 1]."""
    squares = torch.empty(len(y), 1, dtype=torch.float32, device=y.device)
    constants = _constants(y.shape[1])
    gated_norm_kernel[(len(y), 1)](
        y, gate, gate.stride(0), None, squares, None, 0.0, GROUPS=1, **constants, **_options(constants)
    )
    return squares


def scale_rows(
    x: torch.Tensor, squares: torch.Tensor, weight: torch.Tensor, norm_size: int, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """x / sqrt(squares / norm_size + eps) * weight: the rest, where a group's channels are on several ranks."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    constants = _constants(x.shape[1])
    scale_kernel[(len(x),)](x, squares, weight, out, eps, float(norm_size), **constants, **_options(constants))
    return out


def _constants(size: int) -> dict[str, int]:
    return {"SIZE": size, "BLOCK": triton.next_power_of_2(size)}


def _options(constants: dict[str, int]) -> dict[str, object]:
    return launch_options(num_warps=min(16, max(1, constants["BLOCK"] // 512)))


def variants() -> list[Variant]:
    made = []
    for dtype in ("fp32", "bf16", "fp16"):
        for groups, size in ((1, 8192), (8, 1024), (1, 3072), (1, 1536)):
            constants = _constants(size)
            warps = int(str(_options(constants)["num_warps"]))
            chips = AMPERE_ON if dtype == "bf16" else CHIPS
            wide, fp32 = f"*{dtype}:16", "*fp32:16"
            types = {"y": fp32, "gate": wide, "stride": "i32:16", "weight": fp32, "out": wide, "eps": "fp32"}
            made.append(
                Variant(gated_norm_kernel, types, {**constants, "GROUPS": groups, "squares": None}, warps, 3, chips)
            )
        types = {"x": fp32, "squares": fp32, "weight": fp32, "out": wide, "eps": "fp32", "norm_size": "fp32"}
        made.append(Variant(scale_kernel, types, constants, warps, 3, chips))
        types = {"y": fp32, "gate": wide, "stride": "i32:16", "squares": fp32, "eps": "fp32"}
        nothing = {"GROUPS": 1, "weight": None, "out": None}
        made.append(Variant(gated_norm_kernel, types, {**constants, **nothing}, warps, 3, chips))
    return made
