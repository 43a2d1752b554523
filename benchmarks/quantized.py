"""Linear layers by quantised weights, on a CUDA device: the gate and its other half of an 8B model.

python bench.py --preset quantized
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from benchmarks.kernels import HIDDEN, INNER, in_a_graph, random
from benchmarks.probe import Probe, probe_text
from benchmarks.report import finish
from nanovllm.ops.formats import E4M3_128, Q4, Q4_NESTED, Q6_FINE, Q8, Q8_128, Q8_FINE, Codes, Format, Packed, Segment

if TYPE_CHECKING:
    from nanovllm.ops.triton_ops import TritonOps

ROWS = 2 * INNER
BFLOAT16 = "bfloat16, by torch"
FORMS = {
    '`"int8"`': Q8_FINE,
    "Q8_0": Q8,
    "Q5_K, Q6_K": Q6_FINE,
    '`"int4"`, Q4_1': Q4,
    "Q4_K": Q4_NESTED,
    "FP8": E4M3_128,
    "W8A8": Q8_128,
}
EIGHT_BIT = {f"{name}, `quantize_activations`": FORMS[name] for name in ("FP8", "W8A8")}
FEW, MANY = (1, 16, 64, 256), 4096  # tokens


def run(args: argparse.Namespace) -> None:
    """Microseconds of a call within a CUDA graph. Weights are more than caches hold. Floors are those of reading the
    weight, and of many tokens' products: in bfloat16, or twice as many in 8 bits."""
    if not torch.cuda.is_available():
        sys.exit("bench.py: --preset quantized needs a CUDA device, and torch sees none")
    probe, results = Probe().run(), {}
    print(probe_text(probe))
    for name in (BFLOAT16, *FORMS, *EIGHT_BIT):
        if name in EIGHT_BIT and torch.cuda.get_device_capability() < (8, 9):
            continue
        size, call = _calls(name)
        found = results[name] = floors(size, probe, 2 if name in EIGHT_BIT else 1)
        for tokens in (MANY,) if name in EIGHT_BIT else (*FEW, MANY):
            x = random(tokens, HIDDEN)
            found[str(tokens)] = in_a_graph(lambda call=call, x=x: call(x), args.rounds)
        print(f"{name:<30}" + "".join(f"  {column}: {value:.4g}" for column, value in found.items()), flush=True)
    finish(args, probe=probe, rounds=args.rounds, microseconds=results)


def floors(size: int, probe: dict[str, float], faster: int) -> dict[str, float]:
    """size: bytes of a weight. faster: products than bfloat16's."""
    return {
        "bits a weight": 8 * size / (ROWS * HIDDEN),
        "floor, few tokens": size / probe["read_gb_per_s"] / 1e3,
        f"floor, {MANY} tokens": 2 * MANY * ROWS * HIDDEN / faster / probe["bf16_gflop_per_s"] / 1e3,
    }


def _calls(name: str) -> tuple[int, Callable[[torch.Tensor], torch.Tensor]]:
    """Bytes of a weight, and what multiplies by it."""
    from nanovllm.ops.eight_bit_ops import EightBitTritonOps
    from nanovllm.ops.torch_ops import TorchOps
    from nanovllm.ops.triton_ops import TritonOps

    if name == BFLOAT16:
        plain, torchs = random(ROWS, HIDDEN), TorchOps()
        return plain.nbytes, lambda x: torchs.activate(F.linear(x, plain), "silu", gated=True)
    ops = EightBitTritonOps() if name in EIGHT_BIT else TritonOps()
    weight = _weight({**FORMS, **EIGHT_BIT}[name], ops)
    return weight.data.nbytes, lambda x: ops.gated_linear(x, weight, ROWS, None, "silu")


def _weight(form: Format, ops: TritonOps) -> Packed:
    device = torch.device("cuda")
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
