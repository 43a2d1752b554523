"""What Triton's ops have to make of quantised weights: products by their values. For an interpreter on the CPU and for
GPUs."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from kernels import normal
from quantized import FORMS, packed, random_codes
from triton_cases import UNIT

from nanovllm.ops.eight_bit_ops import EightBitTritonOps
from nanovllm.ops.formats import Codes, Format, Packed, Segment
from nanovllm.ops.torch_ops import TorchOps
from nanovllm.ops.triton_ops import TritonOps
from nanovllm.triton_kernels.eight_bit_activations import Activations, quantize_activations

TORCH, TRITON = TorchOps(), TritonOps()


class ManyOps(TritonOps):
    """For which any number of rows is many: by a widened copy."""

    most_quantized_tokens = 0


def close(found: torch.Tensor, wanted: torch.Tensor, scale: float = 1.0) -> None:
    """wanted: in fp32."""
    unit = UNIT[found.dtype]
    torch.testing.assert_close(found.float(), wanted, rtol=4 * unit, atol=8 * unit * scale)


def values(codes: Codes, device: str, dtype: torch.dtype) -> torch.Tensor:
    """What is multiplied by: rounded once."""
    return codes.dequantize().to(dtype).to(device)


def check_linear(device: str, dtype: torch.dtype, form: Format, rows: int, shape: tuple[int, int]) -> None:
    """In registers and by a copy; with all that may be added; rows at odd places."""
    n, k = shape
    codes = random_codes(form, n, k)
    weight, plain = packed(TRITON, codes, device=device, dtype=dtype), values(codes, device, dtype).float()
    x, residual = (normal(rows, size, seed=size).to(device, dtype) for size in (k + 1, n))
    x, bias = x[:, 1:] / 4, normal(n, seed=2).to(device, dtype)
    product = F.linear(x.float(), plain)
    for ops in (TRITON, ManyOps()):
        found = ops.linear(x, weight, n, None)
        assert found.dtype == dtype
        close(found, product)
        close(ops.linear(x, weight, n, bias, residual=residual.clone()), product + bias.float() + residual.float())
        close(ops.linear(x, weight, n, bias, "gelu"), F.gelu(product + bias.float()), 2)
    assert TRITON.linear(x[:0], weight, n, bias).shape == (0, n)


def check_gated(device: str, dtype: torch.dtype, form: Format, rows: int, shape: tuple[int, int]) -> None:
    inner, k = shape
    codes, x = random_codes(form, 2 * inner, k), normal(rows, k).to(device, dtype)
    weight = packed(TRITON, codes, gated=True, device=device, dtype=dtype)
    bias = normal(2 * inner, seed=2).to(device, dtype)
    product = F.linear(x.float(), values(codes, device, dtype).float())
    for ops in (TRITON, ManyOps()):
        for added in (None, bias):
            gate, up = (product if added is None else product + added.float()).chunk(2, dim=1)
            close(ops.gated_linear(x, weight, 2 * inner, added, "silu"), F.silu(gate) * up, 4)


def check_embed(device: str, dtype: torch.dtype, form: Format) -> None:
    """The bits of the values, also at a shard's borders."""
    for n, k in ((70, 300), (33, 31), (1, 1)):
        codes = random_codes(form, n, k)
        ids = torch.tensor([100, 99, 100 + n - 1, 100 + n, 0, 10**6], device=device)
        found = TRITON.embed_packed(packed(TRITON, codes, device=device, dtype=dtype), ids, 100, (n, k))
        assert torch.equal(found, TORCH.embed(values(codes, device, dtype), ids, 100))


def mixed(device: str, dtype: torch.dtype, k: int) -> tuple[Packed, torch.Tensor]:
    """Rows of three forms and of floats, and what they stand for."""
    ends, memory, segments, plain = [0, 40, 57, 64, 90], [], [], []
    for name, start, end in zip(("q4_nested", "q8_fine", None, "q8"), ends, ends[1:], strict=False):
        if name is None:
            floats = normal(end - start, k, seed=start).to(device, dtype)
            data = torch.zeros(floats.nbytes, dtype=torch.uint8, device=device)
            TRITON.pack(floats, gated=False, out=data.view(dtype))
            form, mine = None, floats
        else:
            codes = random_codes(FORMS[name], end - start, k, start)
            form, data, mine = codes.form, packed(TRITON, codes, device=device).data, values(codes, device, dtype)
        segments.append(Segment(slice(start, end), form, sum(map(len, memory))))
        memory.append(data)
        plain.append(mine)
    return Packed(torch.cat(memory), tuple(segments), None, dtype), torch.cat(plain)


def check_mixed_forms(device: str, dtype: torch.dtype) -> None:
    """As query, key and value projections of a GGUF file may have: each is a product of its own."""
    weight, plain = mixed(device, dtype, 64)
    x, bias, residual = (normal(*s, seed=3).to(device, dtype) for s in ((7, 64), (90,), (7, 90)))
    product = F.linear(x.float(), plain.float(), bias.float())
    for ops in (TRITON, ManyOps()):
        close(ops.linear(x, weight, 90, bias), product, 4)
        close(ops.linear(x, weight, 90, bias, residual=residual.clone()), product + residual.float(), 4)
        close(ops.linear(x, weight, 90, bias, "relu"), product.relu(), 4)


def check_floats_alone(device: str, dtype: torch.dtype) -> None:
    """A weight of a GGUF file that is not quantised, beside others that are."""
    plain, x, ids = normal(48, 64).to(device, dtype), normal(5, 64, seed=1).to(device, dtype), torch.tensor([3, 0, 47])
    data = torch.zeros(plain.nbytes, dtype=torch.uint8, device=device)
    TRITON.pack(plain, gated=False, out=data.view(dtype))
    weight = Packed(data, (Segment(slice(0, 48), None, 0),), None, dtype)
    product = F.linear(x.float(), plain.float())
    close(TRITON.linear(x, weight, 48, None, "gelu"), F.gelu(product), 4)
    gate, up = product.chunk(2, dim=1)
    close(TRITON.gated_linear(x, weight, 48, None, "silu"), F.silu(gate) * up, 8)
    assert torch.equal(TRITON.embed_packed(weight, ids.to(device), 0, (48, 64)), plain[ids])


def check_order(device: str, dtype: torch.dtype) -> None:
    """As of AWQ's and GPTQ's weights, whose groups' columns need not lie side by side."""
    codes, x = random_codes(FORMS["q4_128"], 34, 290), normal(5, 290).to(device, dtype)
    order = torch.randperm(290, generator=torch.Generator().manual_seed(0)).int().to(device)
    for ops in (TRITON, ManyOps()):
        weight = packed(ops, codes, device=device, dtype=dtype)
        ordered = dataclasses.replace(weight, columns=order)
        assert torch.equal(ops.linear(x, ordered, 34, None), ops.linear(x[:, order], weight, 34, None))
        gated = dataclasses.replace(packed(ops, codes, gated=True, device=device, dtype=dtype), columns=order)
        close(ops.gated_linear(x, gated, 34, None, "relu"), _gated(ops.linear(x, ordered, 34, None).float()), 4)
    (gate_up, _), (down, plain) = (_experts(device, dtype, "q4_128", 3, s) for s in ((80, 96), (96, 40)))
    orders = torch.stack([torch.roll(torch.arange(40), shift) for shift in range(3)]).int().to(device)
    ordered = dataclasses.replace(down, columns=orders)
    straight = torch.stack([p[:, o.argsort()] for p, o in zip(plain, orders, strict=True)])
    tokens = normal(9, 96).to(device, dtype), *TORCH.route(normal(9, 3).to(device), 2, normalise=True)
    found = TRITON.mixture(*tokens, gate_up, ordered, 40, "silu")
    close(found, TRITON.mixture(*tokens, gate_up, straight, 40, "silu").float(), 4)


def _gated(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=1)
    return gate.relu() * up


def check_mixture(device: str, dtype: torch.dtype, forms: tuple[str | None, str | None], tokens: int) -> None:
    """That of the values, which need not be quantised for both of an expert's layers."""
    count, hidden, inner = 5, 96, 40
    both = [
        _experts(device, dtype, name, count, shape)
        for name, shape in zip(forms, ((2 * inner, hidden), (hidden, inner)), strict=True)
    ]
    x = normal(tokens, hidden).to(device, dtype)
    weights, chosen = TORCH.route(normal(tokens, count, seed=3).to(device), 2, normalise=True)
    found = TRITON.mixture(x, weights, chosen, both[0][0], both[1][0], inner, "silu")
    wanted = TRITON.mixture(x, weights, chosen, both[0][1], both[1][1], inner, "silu")
    close(found, wanted.float(), 2)
    elsewhere = TRITON.mixture(x, weights, chosen, both[0][0], both[1][0], inner, "silu", 100)
    assert not elsewhere.any()


def _experts(device: str, dtype: torch.dtype, name: str | None, count: int, shape: tuple[int, int]):
    """Packed, and as tensors."""
    gated = shape[0] < 96
    if name is None:
        plain = torch.stack([normal(*shape, seed=e) for e in range(count)]).to(device, dtype) / 8
        return Packed(plain.view(torch.uint8).flatten(1), (Segment(slice(0, shape[0]), None, 0),), None, dtype), plain
    codes = [random_codes(FORMS[name], *shape, e) for e in range(count)]
    weights = [packed(TRITON, c, gated=gated, device=device, dtype=dtype) for c in codes]
    whole = dataclasses.replace(weights[0], data=torch.stack([w.data for w in weights]))
    return whole, torch.stack([values(c, device, dtype) for c in codes])


def check_rows_are_their_own(device: str, dtype: torch.dtype, form: Format, ops: TritonOps) -> None:
    """Alone, and in a batch of so many that other tiles would suit them, or a widened copy."""
    codes = random_codes(form, 36, 150)
    weight, x = packed(ops, codes, device=device, dtype=dtype), normal(300, 150).to(device, dtype)
    bias, residual = normal(36, seed=4).to(device, dtype), normal(300, 36, seed=5).to(device, dtype)
    found = ops.linear(x, weight, 36, bias, residual=residual.clone())
    close(found, F.linear(x.float(), values(codes, device, dtype).float(), bias.float()) + residual.float(), 4)
    gated = packed(ops, codes, gated=True, device=device, dtype=dtype)
    also = ops.gated_linear(x, gated, 36, bias, "silu")
    for part in (slice(299, 300), slice(0, 1), slice(90, 125)):
        assert torch.equal(ops.linear(x[part], weight, 36, bias, residual=residual[part].clone()), found[part])
        assert torch.equal(ops.gated_linear(x[part], gated, 36, bias, "silu"), also[part])


class EightBitOps(EightBitTritonOps):
    """For which any number of tokens is many."""

    most_quantized_tokens = 0


def check_activations(device: str, dtype: torch.dtype, codes: torch.dtype) -> None:
    """A row's largest number is exact, others are within half a step; a row of zeros and one that is no number."""
    for size in (1, 300, 1100):
        x = normal(5, size).to(device, dtype)
        x[1], x[3] = 0.0, float("nan")
        found, scales = _by_column(quantize_activations(x, codes), size)
        largest, steps = x.float().abs().amax(1), 127 if codes == torch.int8 else 448
        torch.testing.assert_close(scales, largest / steps, equal_nan=True)
        made, x = (found * scales[:, None])[[0, 1, 2, 4]], x.float()[[0, 1, 2, 4]]
        step = x.abs().amax(1, keepdim=True) / 127 if codes == torch.int8 else x.abs() / 8 + 1e-3
        assert ((made - x).abs() <= 0.501 * step).all()


def _by_column(activations: Activations, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = activations
    place = torch.arange(codes.shape[1], device=codes.device)
    found = torch.empty(codes.shape, device=codes.device)
    found[:, place // 128 * 128 + place % 4 * 32 + place % 128 // 4] = codes.float()
    assert not found[:, size:].any()
    return found[:, :size], scales


def check_eight_bits(device: str, dtype: torch.dtype, name: str, rows: int, shape: tuple[int, int]) -> None:
    """Products of what the activations became."""
    (n, k), ops = shape, EightBitOps()
    codes, x = random_codes(FORMS[name], n, k), normal(rows, k).to(device, dtype)
    kind = torch.int8 if name == "q8_128" else torch.float8_e4m3fn
    found, scales = _by_column(quantize_activations(x, kind), k)
    product = F.linear(found * scales[:, None], codes.dequantize().to(device))
    bias, residual = normal(n, seed=2).to(device, dtype), normal(rows, n, seed=3).to(device, dtype)
    weight = packed(ops, codes, device=device, dtype=dtype)
    close(ops.linear(x, weight, n, bias, residual=residual.clone()), product + bias.float() + residual.float(), 16)
    close(ops.linear(x, weight, n, None, "relu"), product.relu(), 16)
    gated = packed(ops, codes, gated=True, device=device, dtype=dtype)
    gate, up = (product + bias.float()).chunk(2, dim=1)
    close(ops.gated_linear(x, gated, n, bias, "relu"), gate.relu() * up, 128)
    few = TRITON.linear(x, weight, n, None)
    assert (
        torch.equal(EightBitTritonOps().linear(x, weight, n, None), few)
        or rows > EightBitTritonOps.most_quantized_tokens
    )
    assert not torch.equal(ops.linear(x, weight, n, None), few)
