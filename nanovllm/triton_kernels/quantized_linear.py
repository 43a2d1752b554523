"""Linear layers by quantised weights, which are widened in registers.

The product is the weight's rows by the tokens: weights are the operand that comes from registers, where they are
widened, and tokens the one that comes from shared memory. A tile is some rows of the weight by few tokens; codes are
fetched tiles ahead, and all warps have rows of their own, so that no code is widened twice.

For few tokens the floor is reading codes and scales once. Programs have as few rows as give every multiprocessor some,
32 at least; K is not divided, so that a result is one sum in one program. With more tokens, reading these again for
every few rows would cost what small tiles gain.

From some 200 tokens on it is dearer to widen codes for every 64 of them than once for all. To widen a weight of w
numbers in memory and read it again moves some 4.6 w bytes, w ps on an H200; multiplying by it takes 2 T w operations,
of which cuBLAS does some 700 T a second. If these kernels do a third of that, both are equal at 190 tokens, and on an
A100 at 270. All this is reckoned; nothing was measured yet. So up to MOST_ROWS rows are multiplied here, and more by a
widened copy.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.activation import activated
from nanovllm.triton_kernels.linear import aligned
from nanovllm.triton_kernels.packed_codes import LAYOUTS, PackedCodes, chunk_columns, chunk_words, widened
from nanovllm.triton_kernels.variant import AMPERE_ON, Variant, launch_options, multiplies_fast

MOST_ROWS = 256  # of x, beyond which a widened copy of the weight is cheaper
_REGISTERS = 128  # of a thread: with as many no tile spills


@triton.jit
def product(
    x_rows,  # [T] of the first number of each token
    filled,  # [T]
    columns,  # [SIZE_K] which of a token's numbers meets each column of the weight, or None for the same one
    weight,
    block,  # of ROWS rows of the packed weight
    there,  # [ROWS]
    ROWS: tl.constexpr,
    SIZE_K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    LEAST: tl.constexpr,
    E4M3: tl.constexpr,
):
    """fp32 [ROWS, T]: rows of the weight by tokens. A sum goes along K in one order, one part after the other."""
    CHUNK: tl.constexpr = chunk_columns(BITS)
    CHUNKS: tl.constexpr = (SIZE_K + CHUNK - 1) // CHUNK
    WORDS: tl.constexpr = chunk_words(BITS, GROUP, SCALE, LEAST)
    k = tl.arange(0, 32)
    row = tl.arange(0, ROWS)
    pair = row // 32 * (CHUNKS * WORDS)
    first = weight + block.to(tl.int64) * (ROWS // 32 * CHUNKS * WORDS)
    codes = first + ((pair + row % 32 * 32)[:, None] + k[None, :])
    scales = first + (pair + 1024 + row % 32)
    x_places = x_rows[None, :] + k[:, None]
    total = tl.zeros([ROWS, x_rows.shape[0]], tl.float32)
    for chunk in range(CHUNKS):
        words = tl.load(codes + chunk * WORDS, there[:, None], 0)
        for part in tl.static_range(CHUNK // 32):
            start = chunk * CHUNK + part * 32
            if columns is not None:
                numbers = tl.load(columns + start + k, start + k < SIZE_K, 0)
                mask = filled[None, :] & (start + k < SIZE_K)[:, None]
                x = tl.load(x_rows[None, :] + numbers[:, None], mask, 0.0)
            elif SIZE_K % CHUNK == 0:
                x = tl.load(x_places + start, filled[None, :], 0.0)
            else:
                x = tl.load(x_places + start, filled[None, :] & (start + k < SIZE_K)[:, None], 0.0)
            value = widened(words, scales + chunk * WORDS, there, part, BITS, GROUP, SCALE, LEAST, E4M3)
            total = tl.dot(value.to(x.dtype), x, total, input_precision="ieee")
    return total


@triton.jit
def packed_rows(block, SIZE_N: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS] which of a block are in the packed weight. All, where it has whole blocks: loads have no mask then."""
    PACKED: tl.constexpr = (SIZE_N + 15) // 16 * 32 if GATED else (SIZE_N + 31) // 32 * 32
    there = tl.full([ROWS], True, tl.int1)
    if PACKED % ROWS > 0:
        there = block * ROWS + tl.arange(0, ROWS) < PACKED
    return there


@triton.jit
def halves(total):
    """Of a gated product [R, T]: the gate's rows and the others, [R / 2, T] each."""
    R: tl.constexpr = total.shape[0]
    T: tl.constexpr = total.shape[1]
    gate, other = total.reshape([R // 32, 2, 16, T]).permute(0, 2, 3, 1).split()
    return gate.reshape([R // 2, T]), other.reshape([R // 2, T])


@triton.jit
def finish(
    total,  # fp32 [ROWS, T]
    bias,  # as of quantized_linear_kernel
    residual,
    out,
    token,  # [T]
    filled,  # [T]
    block,  # of ROWS rows of the weight
    FIRST: tl.constexpr,
    SIZE_N: tl.constexpr,
    OUT: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Everything behind the product, and the store."""
    SHARE: tl.constexpr = ROWS // 2 if GATED else ROWS
    n = FIRST + block * SHARE + tl.arange(0, SHARE)
    held = n < FIRST + SIZE_N
    if GATED:
        total, other = halves(total)
        if bias is not None:
            total += tl.load(bias + n, held, 0.0).to(tl.float32)[:, None]
            other += tl.load(bias + SIZE_N + n, held, 0.0).to(tl.float32)[:, None]
        total = activated(total, KIND) * other
    else:
        if bias is not None:
            total += tl.load(bias + n, held, 0.0).to(tl.float32)[:, None]
        if KIND != "none":
            total = activated(total, KIND)
    places = token[None, :] * OUT + n[:, None]
    if residual is not None:
        total += tl.load(residual + places, filled[None, :] & held[:, None], 0.0).to(tl.float32)
    tl.store(out + places, total.to(out.dtype.element_ty), filled[None, :] & held[:, None])


@triton.jit(do_not_specialize=["tokens"])
def quantized_linear_kernel(
    x,  # [tokens, SIZE_K]
    weight,
    bias,  # [OUT], or where gated [2 * SIZE_N], or None
    residual,  # [tokens, OUT], or None; may be `out`
    out,
    tokens,
    FIRST: tl.constexpr,  # column of the result that the weight's first row is for
    SIZE_N: tl.constexpr,  # columns of the result; a gate has as many rows, and what it multiplies
    OUT: tl.constexpr,
    SIZE_K: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    LEAST: tl.constexpr,
    E4M3: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: (blocks of rows * tiles of tokens,). KIND: an activation, or "none"."""
    tiles = tl.cdiv(tokens, TOKENS)
    token = ((tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    block = tl.program_id(0) // tiles
    filled = token < tokens
    there = packed_rows(block, SIZE_N, GATED, ROWS)
    total = product(
        x + token * SIZE_K, filled, None, weight, block, there, ROWS, SIZE_K, BITS, GROUP, SCALE, LEAST, E4M3
    )
    finish(total, bias, residual, out, token, filled, block, FIRST, SIZE_N, OUT, KIND, GATED, ROWS)


def quantized_linear(
    x: torch.Tensor,
    weight: PackedCodes,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    part: slice,
    kind: str = "none",
    residual: torch.Tensor | None = None,
    *,
    gated: bool = False,
    tokens: int | None = None,
) -> None:
    """Columns `part` of out [T, N]: kind(x [T, K] @ weight.T + bias) + residual, in fp32 and rounded once; where
    gated, kind(first half) * second half.

    bias: of all columns of out, or where gated of the weight's rows. residual: [T, N]; may be out. tokens: of a tile;
    default by how many there are, of which a row's bits then know.
    """
    assert out.is_contiguous() and (residual is None or residual.is_contiguous())
    size = part.stop - part.start
    rows = 2 * triton.cdiv(size, 16) * 16 if gated else size
    blocks, num_warps, num_stages = _tile(rows, tokens or len(x), multiplies_fast(x))
    grid = triton.cdiv(len(x), blocks["TOKENS"]) * triton.cdiv(rows, blocks["ROWS"])
    if grid:
        quantized_linear_kernel[(grid,)](
            *(aligned(x), weight.data, bias, residual, out, len(x)),
            FIRST=part.start,
            SIZE_N=size,
            OUT=out.shape[1],
            SIZE_K=x.shape[1],
            KIND=kind,
            GATED=gated,
            **weight.layout.constants(),
            **blocks,
            **launch_options(num_warps, num_stages, _REGISTERS),
        )


def _tile(rows: int, tokens: int, fast: bool) -> tuple[dict[str, int], int, int]:
    """Constants, warps and stages. Every warp has 16 rows of the weight; a gate and its other half are 32."""
    if not fast:
        return {"TOKENS": 16, "ROWS": 32}, 8, 2  # with 4, Triton 3.6 spills a register
    mine = 64 if rows >= 8192 or tokens > 32 else 32
    blocks = {"TOKENS": min(64, max(16, triton.next_power_of_2(tokens))), "ROWS": mine}
    return blocks, mine // 16, 3 if tokens > 32 else 4


def variants() -> list[Variant]:
    """Each layout in either dtype for each chip; tiles, sizes and what is given take turns with them."""
    tiles = itertools.cycle([(28672, 64), (4096, 16), (28672, 32), (4096, 32), (28672, 16)])  # rows, tokens
    takes = itertools.cycle(
        (
            *(("silu", True, ("bias",)), ("none", False, ("residual",)), ("gelu", False, ("bias",))),
            *(("gelu_tanh", True, ()), ("none", False, ("bias", "residual")), ("relu", False, ()), ("silu", True, ())),
        )
    )
    made = []
    for turn, layout in enumerate(LAYOUTS):
        next(tiles)  # or each layout would meet them in the same order
        numbers = [*itertools.product(("bf16", "fp16"), AMPERE_ON), ("fp16", 75)]
        for dtype, chip in [*numbers, *([] if turn else [("fp32", 90)])]:
            (rows, tokens), (kind, gated, more) = next(tiles), next(takes)
            blocks, num_warps, num_stages = _tile(rows, tokens, dtype != "fp32" and chip in AMPERE_ON)
            size = rows // (1 + gated)
            types = dict.fromkeys(("x", "out", *more), f"*{dtype}:16") | {"weight": "*i32:16", "tokens": "i32"}
            shape = {"FIRST": 0, "SIZE_N": size, "OUT": size, "SIZE_K": 4096 if turn % 3 else 2080}
            left = dict.fromkeys({"bias", "residual"} - {*more})
            constants = {**shape, "KIND": kind, "GATED": gated, **layout.constants(), **blocks, **left}
            made.append(Variant(quantized_linear_kernel, types, constants, num_warps, num_stages, (chip,), _REGISTERS))
    return made
