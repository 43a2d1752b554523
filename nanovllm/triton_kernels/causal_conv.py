"""The short convolution of Mamba2: one filter a channel over a token and those before it, then SiLU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.mamba2_plan import STRETCH, Mamba2Plan, chunk
from nanovllm.triton_kernels.variant import AMPERE_ON, CHIPS, Variant, launch_options


@triton.jit
def silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def _inputs(projected, stride, conv_state, start, source, channel, held, begin, first, CHANNELS, HISTORY):
    """[N, C] of N places of a chunk; those before it are in the slot, or zero before the sequence's beginning."""
    rows = (begin + source).to(tl.int64)[:, None] * stride
    x = tl.load(projected + rows + channel[None, :], (source >= 0)[:, None] & held[None, :], 0.0).to(tl.float32)
    if start == 0:
        known = (source < 0) & (source >= -first)
        places = conv_state + (HISTORY + source)[:, None] * CHANNELS + channel[None, :]
        x += tl.load(places, known[:, None] & held[None, :], 0.0).to(tl.float32)
    return x


@triton.jit
def conv_kernel(
    projected,  # at the first channel of row 0
    stride,
    filters,  # [KERNEL, CHANNELS]
    bias,
    conv_states,  # [slots, KERNEL - 1, CHANNELS]
    out,  # [T, CHANNELS]
    query_start,
    seq_lens,
    slots,
    stretches,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    HISTORY_ROWS: tl.constexpr,
):
    """Grid: (blocks of channels, stretches), or (blocks, B) where each sequence has one token."""
    if TOKENS == 1:
        sequence = tl.program_id(1)
        start = 0
    else:
        sequence = tl.load(stretches + 2 * tl.program_id(1))
        start = tl.load(stretches + 2 * tl.program_id(1) + 1)
        if sequence < 0:
            return
    begin, count, first = chunk(query_start, seq_lens, sequence, sequence >= 0)
    if count == 0:
        return
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = channel < CHANNELS
    conv_state = conv_states + tl.load(slots + sequence).to(tl.int64) * ((KERNEL - 1) * CHANNELS)
    token = start + tl.arange(0, TOKENS)
    inside = (token < count)[:, None] & held[None, :]
    total = tl.zeros([TOKENS, BLOCK], tl.float32) + tl.load(bias + channel, held, 0.0)[None, :]
    for tap in tl.static_range(KERNEL):
        source = tl.minimum(token, count - 1) + (tap - KERNEL + 1)
        x = _inputs(projected, stride, conv_state, start, source, channel, held, begin, first, CHANNELS, KERNEL - 1)
        total += x * tl.load(filters + tap * CHANNELS + channel, held, 0.0)[None, :]
    places = out + (begin + token).to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    tl.store(places, silu(total).to(out.dtype.element_ty), inside)
    # the chunk's first tokens are all in its first stretch, so nobody else reads what is overwritten
    if KERNEL > 1 and start == 0:
        kept = tl.arange(0, HISTORY_ROWS)
        last = tl.minimum(count - (KERNEL - 1) + kept, count - 1)
        inputs = _inputs(projected, stride, conv_state, 0, last, channel, held, begin, first, CHANNELS, KERNEL - 1)
        tl.debug_barrier()  # all have read
        mask = (kept < KERNEL - 1)[:, None] & held[None, :]
        target = conv_state + kept[:, None] * CHANNELS + channel[None, :]
        tl.store(target, inputs.to(conv_states.dtype.element_ty), mask)


def _constants(channels: int, kernel: int, tokens: int) -> dict[str, int]:
    return {
        "CHANNELS": channels,
        "KERNEL": kernel,
        "TOKENS": tokens,
        "BLOCK": 256 if tokens == 1 else 128,
        "HISTORY_ROWS": triton.next_power_of_2(max(1, kernel - 1)),
    }


def _warps(tokens: int) -> int:
    return 4 if tokens == 1 else 8


def convolve(
    projected: torch.Tensor,
    offset: int,
    filters: torch.Tensor,
    bias: torch.Tensor,
    conv_states: torch.Tensor,
    plan: Mamba2Plan,
) -> torch.Tensor:
    """silu(convolution) [T, C] of the channels of projected [T, ...] from `offset` on, in its dtype.

    filters: fp32 [kernel, C], of the oldest token first; bias: fp32 [C]. conv_states: [slots, kernel - 1, C], the
    inputs before the step, and afterwards those at its end. Reads and writes each number once: memory bounds it.
    """
    kernel, channels = filters.shape
    assert projected.stride(1) == 1 and kernel - 1 <= STRETCH
    out = torch.empty(len(projected), channels, dtype=projected.dtype, device=projected.device)
    stretches = plan.slots if plan.prompts is None else plan.prompts.stretches
    constants = _constants(channels, kernel, 1 if plan.prompts is None else STRETCH)
    conv_kernel[(triton.cdiv(channels, constants["BLOCK"]), len(stretches))](
        *(projected[:, offset:], projected.stride(0), filters, bias, conv_states, out),
        *(plan.query_start, plan.seq_lens, plan.slots, stretches),
        **constants,
        **launch_options(_warps(constants["TOKENS"])),
    )
    return out


def variants() -> list[Variant]:
    fp32, ints = ("filters", "bias"), ("query_start", "seq_lens", "slots", "stretches")
    return [
        Variant(
            conv_kernel,
            {
                **dict.fromkeys(("projected", "conv_states", "out"), f"*{dtype}:16"),
                "stride": "i32:16",
                **dict.fromkeys(fp32, "*fp32:16"),
                **dict.fromkeys(ints, "*i32:16"),
            },
            _constants(channels, 4, tokens),
            _warps(tokens),
            chips=AMPERE_ON if dtype == "bf16" else CHIPS,
        )
        for dtype in ("fp32", "bf16", "fp16")
        for channels in (3328, 1792)
        for tokens in (STRETCH, 1)
    ]
