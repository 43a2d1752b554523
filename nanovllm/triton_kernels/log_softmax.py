"""Log probabilities of rows of logits, each row's sum in one order wherever it lies in memory; torch's order follows
how a row is aligned."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.variant import Variant, launch_options

_BLOCK, _WARPS = 4096, 8


@triton.jit
def log_softmax_kernel(logits, stride, out, size, BLOCK: tl.constexpr):
    """Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    logits += row * stride
    out += row * size
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, size, BLOCK):
        highest = tl.maximum(highest, tl.load(logits + start + lane, start + lane < size, float("-inf")))
    peak = tl.max(highest, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        total += tl.exp(tl.load(logits + start + lane, start + lane < size, float("-inf")) - peak)
    below = tl.log(tl.sum(total, 0))
    for start in range(0, size, BLOCK):
        held = start + lane < size
        tl.store(out + start + lane, tl.load(logits + start + lane, held, 0.0) - peak - below, held)


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """fp32 [R, V] -> [R, V]. Reads a row three times, the last two from L2."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, size = logits.shape
    out = torch.empty(rows, size, dtype=logits.dtype, device=logits.device)
    if rows:
        log_softmax_kernel[(rows,)](logits, logits.stride(0), out, size, _BLOCK, **launch_options(_WARPS))
    return out


def variants() -> list[Variant]:
    types = {"logits": "*fp32:16", "out": "*fp32:16"}
    sizes = ("i32", "i32:16")
    return [
        Variant(log_softmax_kernel, {**types, "stride": kind, "size": kind}, {"BLOCK": _BLOCK}, _WARPS)
        for kind in sizes
    ]
