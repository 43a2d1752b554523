"""Linear layers by quantised weights, on a CUDA device: the gate and its other half of an 8B model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.kernels import HIDDEN, INNER, Case, random
from nanovllm.ops.eight_bit_ops import EightBitTritonOps
from nanovllm.ops.formats import E4M3_128, Q4, Q4_NESTED, Q8, Q8_128, Codes, Format, Packed, Segment
from nanovllm.ops.torch_ops import TorchOps
from nanovllm.ops.triton_ops import TritonOps

FORMS = {"4 bits": Q4, "4 bits, K-quant": Q4_NESTED, "8 bits": Q8, "float8": E4M3_128}
TOKENS = (1, 16, 64, 256, 4096)


def cases() -> Iterator[Case]:
    """Weights are more than caches hold. Sizes are those of the weights, of x and of the result."""
    plain = random(2 * INNER, HIDDEN)
    for name, form in FORMS.items():
        weight = _weight(form)
        for tokens in TOKENS:
            yield _case(f"{name}, {tokens}", weight, plain, tokens)
    for name, form in {"int8 activations": Q8_128, "float8 activations": E4M3_128}.items():
        if torch.cuda.get_device_capability() >= (8, 9):
            yield _case(f"{name}, {TOKENS[-1]}", _weight(form), plain, TOKENS[-1], EightBitTritonOps())


def _case(name: str, weight: Packed, plain: torch.Tensor, tokens: int, taken: TritonOps | None = None) -> Case:
    """taken: in the place of what the bench has."""
    x = random(tokens, HIDDEN)

    def call(ops: TorchOps) -> torch.Tensor:
        if not ops.packs_quantized:
            return ops.activate(F.linear(x, plain), "silu", gated=True)
        return (taken or ops).gated_linear(x, weight, 2 * INNER, None, "silu")

    return Case(name, weight.data.nbytes + x.nbytes + tokens * INNER * x.itemsize, call)


def _weight(form: Format) -> Packed:
    ops, device = TritonOps(), torch.device("cuda")
    data = ops.zeros(ops.codes_bytes(form, 2 * INNER, HIDDEN), device)
    nested = form.scale == torch.int8

    def numbers(span: int, dtype: torch.dtype) -> torch.Tensor:
        shape = INNER, -(-HIDDEN // span)
        return (
            torch.randint(0, 16, shape, device=device, dtype=dtype) if dtype == torch.int8 else random(*shape).to(dtype)
        )

    for half in (0, 1):
        codes = numbers(1, torch.int8)
        scales = numbers(form.group, form.scale)
        least = numbers(form.group, form.scale) if form.least else None
        outer = numbers(256, torch.float16) if nested else None
        made = Codes(form, codes, scales, least, outer, outer if form.least else None)
        ops.pack_codes(made, 0, data, half=half)
    return Packed(data, (Segment(slice(0, 2 * INNER), form, 0),))
