"""Penalties of tokens that a row has seen: a token counts once, however often it comes, without a sort."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.variant import Variant, launch_options

_BLOCK, _WARPS = 1024, 4


@triton.jit
def tokens_of(table, seen, vocab, BLOCK: tl.constexpr):
    """Some of a row's tokens, whether they are there, and which are output; table: as in `penalise`."""
    begin, output, end = tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)
    place = begin + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(seen + place, place < end, -1)
    return token, (token >= 0) & (token < vocab), place >= output


@triton.jit(do_not_specialize=["vocab"])
def clear_kernel(table, seen, counts, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token, known, _ = tokens_of(table + row * 4, seen, vocab, BLOCK)
    tl.store(counts + row * vocab + token, 0, known)


@triton.jit(do_not_specialize=["vocab"])
def count_kernel(table, seen, counts, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token, known, in_output = tokens_of(table + row * 4, seen, vocab, BLOCK)
    tl.atomic_add(counts + row * vocab + token, 1, known & in_output, sem="relaxed")


@triton.jit(do_not_specialize=["vocab"])
def apply_kernel(logits, stride, table, strengths, seen, counts, vocab, BLOCK: tl.constexpr):
    """The first to take a token's count, leaving -1, changes its logit."""
    row = tl.program_id(0).to(tl.int64)
    table, strengths = table + row * 4, strengths + row * 3
    token, known, _ = tokens_of(table, seen, vocab, BLOCK)
    count = tl.atomic_xchg(counts + row * vocab + token, -1, known, sem="relaxed")
    mine = known & (count >= 0)
    repetition, frequency, presence = tl.load(strengths).to(tl.float32), tl.load(strengths + 1), tl.load(strengths + 2)
    target = logits + tl.load(table) * stride + token
    x = tl.load(target, mine, 0.0)
    x = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
    amount = (frequency * count.to(tl.float64) + presence).to(tl.float32)
    tl.store(target, tl.where(count > 0, x - amount, x), mine)


def penalise(
    logits: torch.Tensor, longest: int, table: torch.Tensor, strengths: torch.Tensor, seen: torch.Tensor
) -> None:
    """In place, in some rows of fp32 logits [R, V].

    longest: tokens of a row at most.
    table: int64 [n, 4]: the row, where its tokens begin in `seen` (int32), where its output does, where they end.
    strengths: float64 [n, 3]: repetition, frequency, presence.
    """
    assert logits.stride(1) == 1
    vocab = logits.shape[1]
    counts = torch.empty(len(table), vocab, dtype=torch.int32, device=logits.device)  # read where it was cleared
    grid = len(table), triton.cdiv(longest, _BLOCK)
    options = {"BLOCK": _BLOCK, **launch_options(_WARPS)}
    clear_kernel[grid](table, seen, counts, vocab, **options)
    count_kernel[grid](table, seen, counts, vocab, **options)
    apply_kernel[grid](logits, logits.stride(0), table, strengths, seen, counts, vocab, **options)


def variants() -> list[Variant]:
    types = {
        **dict.fromkeys(("seen", "counts"), "*i32:16"),
        **dict.fromkeys(("stride", "vocab"), "i32"),
        "logits": "*fp32:16",
        "table": "*i64:16",
        "strengths": "*fp64:16",
    }
    return [
        Variant(kernel, {n: kind for n, kind in types.items() if n in kernel.arg_names}, {"BLOCK": _BLOCK}, _WARPS)
        for kernel in (clear_kernel, count_kernel, apply_kernel)
    ]
