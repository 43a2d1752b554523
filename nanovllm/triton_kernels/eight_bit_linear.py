"""Linear layers of which weights and activations have 8 bits: twice the products a second of 16 bits.

Both operands lie as the tensor cores take them, and nothing is widened. 128 columns are summed by the instruction, in
int32 or as it sums float8, and what that gives is multiplied by the row's scale of these columns and summed in fp32. So
one kernel serves scales of whole tensors, of rows and of blocks. A token has one scale, which is for the end: a thread
holds the results of 32 tokens, and would read as many scales for every 128 columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.eight_bit_activations import CHUNK, Activations
from nanovllm.triton_kernels.packed_codes import PackedCodes, chunk_words
from nanovllm.triton_kernels.quantized_linear import finish
from nanovllm.triton_kernels.variant import AMPERE_ON, Variant, launch_options

_BLOCKS, _WARPS, _STAGES = {"TOKENS": 128, "ROWS": 128}, 8, 3


@triton.jit(do_not_specialize=["tokens"])
def eight_bit_linear_kernel(
    x,  # [tokens, CHUNKS * 128] codes
    x_scales,  # [tokens]
    codes,  # the weight's memory, as bytes
    weight,  # the same, as words
    bias,  # as of quantized_linear_kernel, and so all below
    residual,
    out,
    tokens,
    FIRST: tl.constexpr,
    SIZE_N: tl.constexpr,
    OUT: tl.constexpr,
    CHUNKS: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: (blocks of rows * tiles of tokens,)."""
    WORDS: tl.constexpr = chunk_words(8, 128, 32, False)
    tiles = tl.cdiv(tokens, TOKENS)
    token = ((tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    block = tl.program_id(0) // tiles
    row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    filled = token < tokens
    there = row < ((SIZE_N + 15) // 16 * 32 if GATED else SIZE_N)
    k = tl.arange(0, 128)
    pair = row // 32 * (CHUNKS * WORDS)
    w_places = codes + (pair * 4 + row % 32 * 128)[:, None] + k[None, :]
    x_places = x + (token * (CHUNKS * 128))[None, :] + k[:, None]
    w_scales = weight + pair + 1024 + row % 32
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for chunk in range(CHUNKS):
        mine = tl.load(w_places + chunk * (WORDS * 4), there[:, None], 0.0)
        theirs = tl.load(x_places + chunk * 128, filled[None, :], 0.0)
        part = tl.dot(mine, theirs, out_dtype=tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32)
        scale = tl.load(w_scales + chunk * WORDS, there, 0).to(tl.float32, bitcast=True)
        total += part.to(tl.float32) * scale[:, None]
    total *= tl.load(x_scales + token, filled, 0.0)[None, :]
    finish(total, bias, residual, out, token, filled, block, FIRST, SIZE_N, OUT, KIND, GATED, ROWS)


def eight_bit_linear(
    x: Activations,
    weight: PackedCodes,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    part: slice,
    kind: str = "none",
    residual: torch.Tensor | None = None,
    *,
    gated: bool = False,
) -> None:
    """As `quantized_linear`, by a weight of such codes, with fp32 scales of 128 columns and no least values."""
    layout = weight.layout
    assert layout.bits == 8 and layout.group == CHUNK and layout.scale == 32 and not layout.least
    assert out.is_contiguous() and (residual is None or residual.is_contiguous())
    (tokens, size_k), size = x.codes.shape, part.stop - part.start
    rows = 2 * triton.cdiv(size, 16) * 16 if gated else size
    grid = triton.cdiv(tokens, _BLOCKS["TOKENS"]) * triton.cdiv(rows, _BLOCKS["ROWS"])
    if grid:
        eight_bit_linear_kernel[(grid,)](
            *(x.codes, x.scales, weight.data.view(x.codes.dtype), weight.data, bias, residual, out, tokens),
            FIRST=part.start,
            SIZE_N=size,
            OUT=out.shape[1],
            CHUNKS=size_k // CHUNK,
            KIND=kind,
            GATED=gated,
            **_BLOCKS,
            **launch_options(_WARPS, _STAGES),
        )


def variants() -> list[Variant]:
    float8, int8 = ("fp8e4nv", (90,)), ("i8", AMPERE_ON)
    made = []
    for (codes, chips), dtype, kind, gated, given in (
        *((float8, "bf16", "silu", True, ("bias",)), (float8, "fp16", "none", False, ("residual",))),
        *((int8, "bf16", "none", False, ("bias", "residual")), (int8, "fp16", "gelu_tanh", True, ())),
        *((float8, "bf16", "gelu", False, ("bias",)), (int8, "fp16", "relu", False, ())),
    ):
        types = {**dict.fromkeys(("x", "codes"), f"*{codes}:16"), "x_scales": "*fp32:16", "weight": "*i32:16"}
        types |= dict.fromkeys(("out", *given), f"*{dtype}:16") | {"tokens": "i32"}
        sizes = {"FIRST": 0, "SIZE_N": 14336, "OUT": 14336, "CHUNKS": 32, "KIND": kind, "GATED": gated}
        left = dict.fromkeys({"bias", "residual"} - {*given})
        made.append(Variant(eight_bit_linear_kernel, types, {**sizes, **_BLOCKS, **left}, _WARPS, _STAGES, chips))
    return made
