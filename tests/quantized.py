"""Quantised weights for tests: random codes of each form, and what they stand for, worked out by numpy."""

from __future__ import annotations

import numpy as np
import torch

from nanovllm.ops.formats import (
    E4M3_128,
    Q4,
    Q4_32,
    Q4_64,
    Q4_128,
    Q4_NESTED,
    Q5,
    Q5_NESTED,
    Q6_FINE,
    Q8,
    Q8_128,
    Q8_FINE,
    Q8_LEAST_32,
    Q8_LEAST_128,
    Codes,
    Format,
    Packed,
    Segment,
)

FORMS = {
    "q4": Q4,
    "q8": Q8,
    "q5": Q5,
    "q4_nested": Q4_NESTED,
    "q5_nested": Q5_NESTED,
    "q6_fine": Q6_FINE,
    "q8_fine": Q8_FINE,
    "q4_32": Q4_32,
    "q4_64": Q4_64,
    "q4_128": Q4_128,
    "q8_128": Q8_128,
    "q8_least_32": Q8_LEAST_32,
    "q8_least_128": Q8_LEAST_128,
    "e4m3_128": E4M3_128,
}
_RANGES = {8: (-128, 127), 6: (-32, 31), 5: (0, 31), 4: (0, 15)}


def random_codes(form: Format, rows: int, cols: int, seed: int = 0) -> Codes:
    """Scales have as many digits as files have: products with codes are exact in fp32."""
    random = np.random.default_rng(seed)
    lowest, highest = _RANGES[form.bits]
    codes = torch.from_numpy(random.integers(lowest, highest, (rows, cols), dtype=np.int8, endpoint=True))
    if form.e4m3:
        codes[(codes == 127) | (codes == -1)] = 0  # which are NaN
    groups = -(-cols // form.group)

    def uniform(low: float, high: float, count: int) -> torch.Tensor:
        return torch.from_numpy(random.uniform(low, high, (rows, count)).astype(np.float16))

    if form.scale == torch.int8:
        inner = [torch.from_numpy(random.integers(0, 64, (rows, groups), dtype=np.int8)) for _ in range(2)]
        outer = uniform(1e-4, 1e-3, -(-cols // 256)), uniform(-1e-3, 0, -(-cols // 256))
        return Codes(form, codes, *inner, *outer) if form.least else Codes(form, codes, inner[0], None, outer[0])
    scales, least = uniform(1e-3, 1e-2, groups), uniform(-0.05, 0, groups)
    return Codes(form, codes, scales.to(form.scale), least.to(form.scale) if form.least else None)


def dequantized(codes: Codes) -> np.ndarray:
    """fp64 [rows, cols]."""
    rows, cols = codes.codes.shape

    def at(values: torch.Tensor | None, outer: torch.Tensor | None, column: int) -> np.ndarray | float:
        if values is None:
            return 0.0
        times = 1.0 if outer is None else outer[:, column // 256].double().numpy()
        return values[:, column // codes.form.group].double().numpy() * times

    numbers, out = _numbers(codes), np.empty((rows, cols))
    for c in range(cols):
        scale, least = at(codes.scales, codes.outer, c), at(codes.least, codes.outer_least, c)
        out[:, c] = numbers[:, c] * scale + least
    return out


def _numbers(codes: Codes) -> np.ndarray:
    """What codes stand for; of e4m3: a sign, 4 bits of exponent, 3 of fraction (Micikevicius et al. 2022)."""
    if not codes.form.e4m3:
        return codes.codes.numpy()
    bits = codes.codes.numpy().view(np.uint8).astype(int)
    exponent, fraction = bits >> 3 & 15, bits & 7
    sizes = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10))
    return np.where(bits & 128, -sizes, sizes)


def packed(ops, codes: Codes, *, gated: bool = False, device: str = "cpu", dtype=torch.bfloat16) -> Packed:
    rows, cols = codes.codes.shape
    data = ops.zeros(ops.codes_bytes(codes.form, rows + 32, cols), torch.device(device))
    if gated:
        for half in (0, 1):
            ops.pack_codes(_rows(codes, slice(half * rows // 2, (half + 1) * rows // 2)), 0, data, half=half)
    else:  # as if there were three parts, which end within panels
        for first, end in ((0, rows // 3), (rows // 3, rows // 2), (rows // 2, rows)):
            if first < end:
                ops.pack_codes(_rows(codes, slice(first, end)), first, data)
    return Packed(data, (Segment(slice(0, rows), codes.form, 0),), None, dtype)


def _rows(codes: Codes, part: slice) -> Codes:
    """With gaps between its rows, as those of a matrix whose last group is not whole."""
    wide = torch.nn.functional.pad(codes.codes, (0, 3))[:, :-3]
    others = (codes.scales, codes.least, codes.outer, codes.outer_least)
    return Codes(codes.form, wide[part], *(None if x is None else x[part] for x in others))
