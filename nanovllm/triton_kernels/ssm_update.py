"""Tokens one by one through Mamba2's recurrence (ssm_scan.py), in fp32: one of each decoding sequence, or all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.mamba2_plan import CELL, Mamba2Plan, chunk, in_cells
from nanovllm.triton_kernels.ssm_steps import time_step
from nanovllm.triton_kernels.variant import AMPERE_ON, CHIPS, Variant, launch_options

_ELEMENTS = 4096  # of a state, which a program holds in registers


@triton.jit
def update_kernel(
    projected,  # at the step size of row 0's first head
    stride,
    mixed,  # [T, CHANNELS], x | B | C
    A,  # [HEADS]
    D,
    dt_bias,
    query_start,
    seq_lens,
    slots,
    states,  # [slots, HEADS, HEAD_DIM, STATE]
    y,  # [T, HEADS * HEAD_DIM]
    shortest,
    longest,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    STATE: tl.constexpr,
    CELL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ALL: tl.constexpr,
):
    """Grid: (heads and blocks of P, B). ALL: tokens, also those that could go through cells."""
    INNER: tl.constexpr = HEADS * HEAD_DIM
    CHANNELS: tl.constexpr = INNER + 2 * GROUPS * STATE
    BLOCKS: tl.constexpr = (HEAD_DIM + BLOCK_P - 1) // BLOCK_P
    sequence = tl.program_id(1)
    begin, count, first = chunk(query_start, seq_lens, sequence, sequence >= 0)
    start = 0 if ALL else in_cells(count, first, CELL)
    if start == count:
        return
    head = tl.program_id(0) // BLOCKS
    p = tl.program_id(0) % BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    s = tl.arange(0, BLOCK_S)
    slot = tl.load(slots + sequence).to(tl.int64)
    places = states + ((slot * HEADS + head) * HEAD_DIM + p[:, None]) * STATE + s[None, :]
    held = (p < HEAD_DIM)[:, None] & (s < STATE)[None, :]
    known = tl.where(first + start > 0, HEAD_DIM, 0)  # what a new sequence finds in its slot is another's
    state = tl.load(places, held & (p < known)[:, None], 0.0)
    A, D, dt_bias = tl.load(A + head), tl.load(D + head), tl.load(dt_bias + head)
    for token in range(start, count):
        row = (begin + token).to(tl.int64)
        xs = mixed + row * CHANNELS
        Bs = xs + INNER + head // (HEADS // GROUPS) * STATE
        x = tl.load(xs + head * HEAD_DIM + p, p < HEAD_DIM, 0.0).to(tl.float32)
        B = tl.load(Bs + s, s < STATE, 0.0).to(tl.float32)
        C = tl.load(Bs + GROUPS * STATE + s, s < STATE, 0.0).to(tl.float32)
        raw = tl.load(projected + row * stride + head).to(tl.float32) + dt_bias
        dt, decay = time_step(raw, A, shortest, longest)
        state = state * tl.exp2(decay) + (dt * x)[:, None] * B[None, :]
        out = tl.sum(state * C[None, :], 1) + D * x
        tl.store(y + row * INNER + head * HEAD_DIM + p, out, p < HEAD_DIM)
    tl.store(places, state, held)


def update(
    projected: torch.Tensor,
    mixed: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    limits: tuple[float, float],
    groups: int,
    states: torch.Tensor,
    y: torch.Tensor,
    plan: Mamba2Plan,
    *,
    every: bool,
) -> None:
    """The last token of every sequence whose last cell has but this one; arguments as of `scan`, which goes before. Or
    every token of every sequence, without a `scan`: a prompt takes as many turns as it has tokens.

    Reads and writes each state once, which is what bounds it: for Granite 4.0 H 1B 3 MiB a sequence and layer, so
    that 128 sequences take 84 us at an H200's 4.8 TB/s. Not measured yet.
    """
    _, heads, head_dim, size = states.shape
    constants = _constants(heads, head_dim, groups, size, every)
    update_kernel[(heads * triton.cdiv(head_dim, constants["BLOCK_P"]), len(plan.slots))](
        *(projected[:, projected.shape[1] - heads :], projected.stride(0), mixed, A, D, dt_bias),
        *(plan.query_start, plan.seq_lens, plan.slots, states, y, *limits),
        **constants,
        **launch_options(num_warps=4),
    )


def _constants(heads: int, head_dim: int, groups: int, size: int, every: bool) -> dict[str, int]:
    block_s = triton.next_power_of_2(size)
    block_p = min(triton.next_power_of_2(head_dim), max(1, _ELEMENTS // block_s))
    shape = {"HEADS": heads, "HEAD_DIM": head_dim, "GROUPS": groups, "STATE": size, "CELL": CELL}
    return {**shape, "BLOCK_P": block_p, "BLOCK_S": block_s, "ALL": every}


def variants() -> list[Variant]:
    wide = ("projected", "mixed")
    fp32 = ("A", "D", "dt_bias", "states", "y")
    return [
        Variant(
            update_kernel,
            {
                **dict.fromkeys(wide, f"*{dtype}:16"),
                "stride": "i32:16",
                **dict.fromkeys(fp32, "*fp32:16"),
                **dict.fromkeys(("query_start", "seq_lens", "slots"), "*i32:16"),
                **dict.fromkeys(("shortest", "longest"), "fp32"),
            },
            _constants(*sizes, every),
            chips=AMPERE_ON if dtype == "bf16" else CHIPS,
        )
        for dtype in ("fp32", "bf16", "fp16")
        for sizes in ((128, 64, 8, 256), (48, 64, 1, 128), (48, 32, 1, 128))
        for every in (True, False)
    ]
