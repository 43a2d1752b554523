"""The activation of a gated MLP: one reading of the gate and of what it multiplies, one writing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.variant import AMPERE_ON, CHIPS, Variant, launch_options

_BLOCK, _WARPS = 1024, 4  # numbers of a program, eight a thread
KINDS = {
    "gelu": "gelu",
    "relu": "relu",
    **dict.fromkeys(("silu", "swish"), "silu"),
    **dict.fromkeys(("gelu_fast", "gelu_new", "gelu_pytorch_tanh"), "gelu_tanh"),
}


@triton.jit
def activated(x, KIND: tl.constexpr):
    """KIND: silu, gelu, gelu_tanh or relu; x in fp32."""
    if KIND == "silu":
        out = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        out = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # 1 + tanh(y) = 2 - 2 / (exp(2 y) + 1), which no y takes out of range
        out = x * (1.0 - 1.0 / (tl.exp(1.5957691216057308 * (x + 0.044715 * x * x * x)) + 1.0))
    else:
        out = tl.where(x < 0.0, 0.0, x)  # NaN stays
    return out


@triton.jit
def gated_kernel(x, out, stride, size, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    gate = tl.load(x + row * stride + column, mask, 0.0).to(tl.float32)
    other = tl.load(x + row * stride + size + column, mask, 0.0).to(tl.float32)
    tl.store(out + row * size + column, (activated(gate, KIND) * other).to(out.dtype.element_ty), mask)


def activate_gated(x: torch.Tensor, act: str) -> torch.Tensor:
    """act(first half of x [T, 2 N]) * second half -> [T, N]; computed in fp32 and rounded once."""
    tokens, size = x.shape[0], x.shape[1] // 2
    out = torch.empty(tokens, size, dtype=x.dtype, device=x.device)
    if tokens and size:
        x = x if x.stride(1) == 1 else x.contiguous()
        grid = tokens, triton.cdiv(size, _BLOCK)
        gated_kernel[grid](x, out, x.stride(0), size, KINDS[act], _BLOCK, **launch_options(_WARPS))
    return out


def variants() -> list[Variant]:
    return [
        Variant(
            gated_kernel,
            {"x": f"*{dtype}:16", "out": f"*{dtype}:16", "stride": f"i32{whole}", "size": f"i32{whole}"},
            {"KIND": kind, "BLOCK": _BLOCK},
            num_warps=_WARPS,
            chips=chips,
        )
        for dtype, chips, whole in (("fp32", CHIPS, ""), ("bf16", AMPERE_ON, ":16"), ("fp16", CHIPS, ":16"))
        for kind in sorted({*KINDS.values()})
    ]
