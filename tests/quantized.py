"""Quantised weights for tests: random codes of each form, and what they stand for, worked out by numpy."""

from __future__ import annotations

import numpy as np
import torch

from nanovllm.ops.formats import INT8, Q4, Q4_WIDE, Q8, Q8_FINE, Q8_LEAST, Q8_WIDE, Codes, Format, Packed, Segment

FORMS = {
    "int8": INT8,
    "q4": Q4,
    "q8": Q8,
    "q8_least": Q8_LEAST,
    "q4_wide": Q4_WIDE,
    "q8_wide": Q8_WIDE,
    "q8_fine": Q8_FINE,
}
_WIDEST = {8: 127, 4: 15}


def random_codes(form: Format, rows: int, cols: int, seed: int = 0) -> Codes:
    """Scales have as many digits as files have: products with codes are exact in fp32."""
    random = np.random.default_rng(seed)
    most = 31 if form.group == 16 else _WIDEST[form.bits]
    codes = random.integers(0 if form.bits == 4 else -most, most + 1, (rows, cols), dtype=np.int8)
    groups = 1 if form.group is None else -(-cols // form.group)
    scales = random.uniform(0.001, 0.01, (rows, groups)).astype(np.float16)
    least = torch.from_numpy(-random.uniform(0, 0.05, (rows, groups)).astype(np.float16)).to(form.scale)
    return Codes(form, torch.from_numpy(codes), torch.from_numpy(scales).to(form.scale), least if form.least else None)


def dequantized(codes: Codes) -> np.ndarray:
    """fp64 [rows, cols]."""
    rows, cols = codes.codes.shape
    group = codes.form.group or cols
    out = np.empty((rows, cols))
    for c in range(cols):
        least = 0.0 if codes.least is None else codes.least[:, c // group].double().numpy()
        out[:, c] = codes.codes[:, c].numpy() * codes.scales[:, c // group].double().numpy() + least
    return out


def packed(ops, codes: Codes, *, gated: bool = False) -> Packed:
    rows, cols = codes.codes.shape
    data = ops.zeros(codes.form.packed_bytes(rows + 32, cols))
    if gated:
        for half in (0, 1):
            ops.pack_codes(_rows(codes, slice(half * rows // 2, (half + 1) * rows // 2)), 0, data, half=half)
    else:  # as if there were three parts, which end within panels
        for first, end in ((0, rows // 3), (rows // 3, rows // 2), (rows // 2, rows)):
            if first < end:
                ops.pack_codes(_rows(codes, slice(first, end)), first, data)
    return Packed(data, (Segment(slice(0, rows), codes.form, 0),))


def _rows(codes: Codes, part: slice) -> Codes:
    """With gaps between its rows, as those of a matrix whose last group is not whole."""
    wide = torch.nn.functional.pad(codes.codes, (0, 3))[:, :-3]
    return Codes(codes.form, wide[part], codes.scales[part], None if codes.least is None else codes.least[part])
