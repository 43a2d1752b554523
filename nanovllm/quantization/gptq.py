"""GPTQ (Frantar et al. 2023) as AutoGPTQ and GPTQModel write it: https://github.com/ModelCloud/GPTQModel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nanovllm.quantization.published import Grid, Weight, integer_form
from nanovllm.quantization.raw import HALVES, Expected, Raw, fields, matrix, require, signed
from nanovllm.quantization.settings import Settings


@dataclass(frozen=True, eq=False)
class GPTQWeight(Weight):
    """qweight: int32 [in / words, out], where a word has 32 / bits codes. scales: [groups, out]. qzeros: int32
    [groups, out / words], less one if `minus_one`. g_idx: int32 [in], a column's group."""

    bits: int
    minus_one: bool

    def grid(self, tensors: Mapping[str, torch.Tensor], rows: slice) -> Grid:
        bits, per_word = self.bits, 32 // self.bits
        codes = fields(tensors["qweight"][:, rows], bits).transpose(0, 1).flatten(1)
        first = rows.start // per_word
        zeros = fields(tensors["qzeros"][:, first : -(-rows.stop // per_word)], bits).flatten(1)
        zeros = (zeros + self.minus_one) & (1 << bits) - 1
        zeros = zeros[:, rows.start - first * per_word : rows.stop - first * per_word].t()
        return Grid(signed(codes, bits), tensors["scales"][:, rows].t(), signed(zeros.contiguous(), bits))

    def groups(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        return tensors["g_idx"].long() if "g_idx" in tensors else None


@dataclass(frozen=True)
class GPTQ:
    """group: as in AWQ. desc_act: columns were quantised in another order, and groups are of that order's."""

    bits: int
    group: int | None
    desc_act: bool
    minus_one: bool
    method = "gptq"
    companions = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    @classmethod
    def of(cls, settings: Settings) -> GPTQ:
        settings.refuse("is_marlin_format")
        settings.choice("pack_dtype", "int32", default="int32")
        if any(not rule.startswith("-:") for rule in settings.get("dynamic") or ()):
            raise settings.unsupported("dynamic, other settings for some modules,", "use a version without it")
        layout = settings.choice(settings.first("checkpoint_format", "format"), "gptq", "gptq_v2", default="gptq")
        return cls(
            settings.choice("bits", 4, 8),
            settings.group_size(),
            settings.choice("desc_act", False, True, default=False),
            layout == "gptq",
        )

    def weight(self, module: str, parts: Mapping[str, Raw]) -> Weight:
        words, rows = matrix(module, parts, "qweight", torch.int32)
        per_word = 32 // self.bits
        cols = words * per_word
        span = self.group or cols
        groups = -(-cols // span)
        ordered = self.desc_act and groups > 1
        expected: Expected = {
            "scales": ((groups, rows), HALVES),
            "qzeros": ((groups, -(-rows // per_word)), (torch.int32,)),
        }
        if ordered or "g_idx" in parts:
            expected["g_idx"] = (cols,), (torch.int32,)
        require(module, parts, expected)
        form = integer_form(module, self.bits, span, cols, zeros=True)
        return GPTQWeight(module, parts, (rows, cols), span, form, ordered, self.bits, self.minus_one)
