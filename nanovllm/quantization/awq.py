"""AWQ (Lin et al. 2024) as AutoAWQ writes it: https://github.com/casper-hansen/AutoAWQ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nanovllm.quantization.published import Grid, Weight, integer_form
from nanovllm.quantization.raw import HALVES, Expected, Raw, fields, matrix, require
from nanovllm.quantization.settings import Settings


class AWQWeight(Weight):
    """qweight: int32 [in, out / 8]. scales: [groups, out]. qzeros: int32 [groups, out / 8]; without them, 8."""

    def grid(self, tensors: Mapping[str, torch.Tensor], rows: slice) -> Grid:
        scales = tensors["scales"][:, rows].t()
        zeros = _unpacked(tensors["qzeros"], rows) if "qzeros" in tensors else torch.full(scales.shape, 8)
        return Grid(_unpacked(tensors["qweight"], rows).view(torch.int8), scales, zeros)


@dataclass(frozen=True)
class AWQ:
    """group: columns that share a scale, None for all. zero_point: whether zeros are stored."""

    group: int | None
    zero_point: bool
    method = "awq"
    companions = frozenset({"qweight", "qzeros", "scales"})

    @classmethod
    def of(cls, settings: Settings) -> AWQ:
        settings.choice(settings.first("version", "format", "checkpoint_format"), "gemm", "GEMM", default="gemm")
        if settings.get("backend") == "llm-awq":  # others name kernels, this one a layout
            raise settings.unsupported("backend='llm-awq'", "use a version that AutoAWQ wrote")
        settings.choice(settings.first("w_bit", "bits"), 4)  # AutoAWQ's own names, then transformers'
        group = settings.group_size(settings.first("q_group_size", "group_size"))
        return cls(group, settings.choice("zero_point", True, False, default=True))

    def weight(self, module: str, parts: Mapping[str, Raw]) -> Weight:
        cols, words = matrix(module, parts, "qweight", torch.int32)
        span = self.group or cols
        groups = -(-cols // span)
        expected: Expected = {"scales": ((groups, words * 8), HALVES)}
        if self.zero_point or "qzeros" in parts:
            expected["qzeros"] = (groups, words), (torch.int32,)
        require(module, parts, expected)
        form = integer_form(module, 4, span, cols, zeros=True)
        return AWQWeight(module, parts, (words * 8, cols), span, form, ordered=False)


def _unpacked(packed: torch.Tensor, rows: slice) -> torch.Tensor:
    """[n, out / 8] -> uint8 [rows, n]. Of eight rows in a word, number 4 b + 2 c + a is at place 4 a + 2 b + c."""
    first = rows.start // 8
    found = fields(packed[:, first : -(-rows.stop // 8)], 4).unflatten(-1, (2, 2, 2))
    in_turn = found.permute(1, 3, 4, 2, 0).flatten(0, 3)
    return in_turn[rows.start - first * 8 : rows.stop - first * 8]
