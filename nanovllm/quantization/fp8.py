"""FP8 (Micikevicius et al. 2022) with a scale a block or a tensor, as DeepSeek and Qwen publish it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nanovllm.errors import ModelNotSupported, WeightError
from nanovllm.ops.formats import E4M3_128
from nanovllm.quantization.published import Grid, Weight
from nanovllm.quantization.raw import HALVES, Raw, matrix, require
from nanovllm.quantization.settings import Settings

SCALES = (torch.float32, *HALVES)
_NAN = 0x7F  # but for the sign


@dataclass(frozen=True, eq=False)
class FP8Weight(Weight):
    """weight: e4m3 [out, in]. The tensor `scale` has a scale a row, or one for each `rows_a_scale` and `span`."""

    scale: str
    rows_a_scale: int

    def grid(self, tensors: Mapping[str, torch.Tensor], rows: slice) -> Grid:
        codes = tensors["weight"][rows].view(torch.int8)
        if ((codes & _NAN) == _NAN).any():
            raise WeightError(f"{self.module}.weight holds NaN; fetch it again")
        return Grid(codes, scales_of_rows(tensors[self.scale], rows, self.shape[0], self.rows_a_scale), None)


@dataclass(frozen=True)
class FP8:
    """block: rows and columns that share a scale; None for one scale, or one a row."""

    block: tuple[int, int] | None
    method = "fp8"
    companions = frozenset(
        {"weight", "weight_scale", "weight_scale_inv", "input_scale", "output_scale", "activation_scale"}
    )

    @classmethod
    def of(cls, settings: Settings) -> FP8:
        settings.choice("fmt", "e4m3", default="e4m3")
        settings.choice("activation_scheme", "dynamic", "static", default="dynamic")
        block = settings.get("weight_block_size")
        return cls(None if block is None else block_size(settings, "weight_block_size", block))

    def weight(self, module: str, parts: Mapping[str, Raw]) -> Weight | None:
        scales = [name for name in ("weight_scale_inv", "weight_scale") if name in parts]
        if not scales:
            if "weight" in parts and parts["weight"].dtype == torch.float8_e4m3fn:
                raise WeightError(f"{module} is quantised, but lacks weight_scale_inv or weight_scale")
            return None
        return fp8_weight(module, parts, scales[0], self.block)


def fp8_weight(module: str, parts: Mapping[str, Raw], scale: str, block: tuple[int, int] | None) -> FP8Weight:
    """block: as in FP8."""
    rows, cols = matrix(module, parts, "weight", torch.float8_e4m3fn)
    if block is not None:
        a, b = block
        require(module, parts, {scale: ((-(-rows // a), -(-cols // b)), SCALES)})
        if b < cols and b % E4M3_128.group:
            raise ModelNotSupported(f"{module}: blocks of {b} columns are not supported; multiples of 128 are")
        return FP8Weight(module, parts, (rows, cols), b, E4M3_128, ordered=False, scale=scale, rows_a_scale=a)
    require(module, parts, {scale: (one_scale(parts[scale], rows), SCALES)})
    return FP8Weight(module, parts, (rows, cols), cols, E4M3_128, ordered=False, scale=scale, rows_a_scale=1)


def one_scale(raw: Raw, rows: int) -> tuple[int, ...]:
    """The shape of a scale for the whole weight, or of one for each of its rows."""
    return raw.shape if raw.shape in ((), (1,), (1, 1), (rows,)) else (rows, 1)


def scales_of_rows(scales: torch.Tensor, rows: slice, all_rows: int, rows_a_scale: int = 1) -> torch.Tensor:
    """[rows, groups], from a number, from one a row, or from a table."""
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(rows.stop - rows.start, 1)
    table = scales.reshape(-(-all_rows // rows_a_scale), -1)
    return table[torch.arange(rows.start, rows.stop) // rows_a_scale]


def block_size(settings: Settings, key: str, block: object) -> tuple[int, int]:
    if isinstance(block, (list, tuple)) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block):
        return block[0], block[1]
    raise settings.unsupported(f"{key}={block!r}", "it must be rows and columns")
