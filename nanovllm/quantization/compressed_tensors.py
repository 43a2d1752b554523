"""compressed-tensors, as llm-compressor writes it: https://github.com/vllm-project/compressed-tensors."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nanovllm.errors import ModelNotSupported, WeightError
from nanovllm.quantization.fp8 import SCALES, block_size, fp8_weight, one_scale, scales_of_rows
from nanovllm.quantization.published import Grid, Weight, integer_form
from nanovllm.quantization.raw import HALVES, Expected, Raw, fields, matrix, require, signed
from nanovllm.quantization.settings import Settings

logger = logging.getLogger(__name__)
_PACKED, _INTEGERS, _FLOATS, _NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"


@dataclass(frozen=True, eq=False)
class PackedWeight(Weight):
    """weight_packed: int32 [out, in / words], where a word has 32 / bits codes. weight_scale: [out, groups].
    weight_zero_point: int32 [out / words, groups], or int8 [out, groups]. weight_g_idx: [in], a column's group."""

    bits: int

    def grid(self, tensors: Mapping[str, torch.Tensor], rows: slice) -> Grid:
        codes = fields(tensors["weight_packed"][rows], self.bits).flatten(1)[:, : self.shape[1]]
        scales = scales_of_rows(tensors["weight_scale"], rows, self.shape[0])
        return Grid(signed(codes, self.bits), scales, self._zeros(tensors.get("weight_zero_point"), scales, rows))

    def groups(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        found = tensors.get("weight_g_idx")
        return None if found is None or (found == -1).all() else found.long()

    def _zeros(self, found: torch.Tensor | None, scales: torch.Tensor, rows: slice) -> torch.Tensor | None:
        middle = 8 if self.bits == 4 else 0
        if found is None:
            return torch.full(scales.shape, middle) if middle else None
        if found.dtype == torch.int8:
            return found[rows] + middle
        per_word = 32 // self.bits
        first = rows.start // per_word
        zeros = fields(found[first : -(-rows.stop // per_word)], self.bits).transpose(1, 2).flatten(0, 1)
        return signed(zeros[rows.start - first * per_word : rows.stop - first * per_word].contiguous(), self.bits)


class IntegerWeight(Weight):
    """weight: int8 [out, in]. weight_scale: one, or [out, groups]. weight_zero_point: int8 of the same shape."""

    def grid(self, tensors: Mapping[str, torch.Tensor], rows: slice) -> Grid:
        zeros = tensors.get("weight_zero_point")
        return Grid(
            tensors["weight"][rows],
            scales_of_rows(tensors["weight_scale"], rows, self.shape[0]),
            None if zeros is None else scales_of_rows(zeros, rows, self.shape[0]),
        )


@dataclass(frozen=True)
class Group:
    """Settings that some modules share. targets: their names or classes, or "re:" and a pattern. group: columns that
    share a scale, None for all. block: rows and columns that do."""

    targets: tuple[str, ...]
    layout: str
    bits: int
    is_float: bool
    symmetric: bool
    group: int | None
    block: tuple[int, int] | None
    ordered: bool

    @classmethod
    def of(cls, group: Settings, layout: str | None) -> Group:
        """layout: of groups that do not say theirs."""
        if not group.get("weights"):
            raise group.unsupported("a group without weights", "use a version that has none")
        weights = group.within("weights")
        layout = group.choice("format", _PACKED, _INTEGERS, _FLOATS, _NAIVE, default=layout)
        is_float = weights.choice("type", "int", "float", default="int") == "float"
        if is_float != (layout == _FLOATS) and layout != _NAIVE:
            raise weights.unsupported(f"type={weights.get('type')!r} in format={layout!r}", "use another version")
        bits = weights.choice("num_bits", *((4, 8) if layout == _PACKED else (8,)), default=8)
        kinds = ("tensor", "channel", "block") if is_float else ("tensor", "channel", "group")
        strategy = weights.choice("strategy", *kinds, default=_strategy(weights))
        weights.choice("dynamic", False, default=False)
        return cls(
            tuple(group.get("targets") or ()),
            layout,
            bits,
            is_float,
            weights.choice("symmetric", *((True,) if is_float else (True, False)), default=True),
            weights.group_size() if strategy == "group" else None,
            block_size(weights, "block_structure", _block(weights)) if strategy == "block" else None,
            weights.choice("actorder", None, "group", "dynamic", "weight", "static", False, True)
            in ("group", "dynamic", True),
        )

    def weight(self, module: str, parts: Mapping[str, Raw]) -> Weight:
        if self.is_float:
            return fp8_weight(module, parts, "weight_scale", self.block)
        return self._packed(module, parts) if self.layout == _PACKED else self._integers(module, parts)

    def _packed(self, module: str, parts: Mapping[str, Raw]) -> Weight:
        require(module, parts, {"weight_shape": ((2,), (torch.int64, torch.int32))})
        rows, cols = parts["weight_shape"].load().tolist()
        per_word = 32 // self.bits
        span = self.group or cols
        form = integer_form(module, self.bits, span, cols, zeros=not self.symmetric)
        groups = -(-cols // span)
        expected: Expected = {
            "weight_packed": ((rows, -(-cols // per_word)), (torch.int32,)),
            "weight_scale": (self._scale_shape(parts, rows, groups), HALVES if form.least else SCALES),
        }
        if not self.symmetric:
            is_packed = "weight_zero_point" in parts and parts["weight_zero_point"].dtype == torch.int32
            zero_rows = -(-rows // per_word) if is_packed else rows
            expected["weight_zero_point"] = (zero_rows, groups), (torch.int32, torch.int8)
        ordered = self.ordered and groups > 1
        if ordered:
            expected["weight_g_idx"] = (cols,), (torch.int32, torch.int64)
        require(module, parts, expected)
        kept = {name: parts[name] for name in (*expected, "weight_g_idx") if name in parts}
        return PackedWeight(module, kept, (rows, cols), span, form, ordered, self.bits)

    def _integers(self, module: str, parts: Mapping[str, Raw]) -> Weight:
        rows, cols = matrix(module, parts, "weight", torch.int8)
        span = self.group or cols
        form = integer_form(module, 8, span, cols, zeros=not self.symmetric)
        groups = -(-cols // span)
        shape = self._scale_shape(parts, rows, groups)
        expected: Expected = {"weight_scale": (shape, HALVES if form.least else SCALES)}
        if not self.symmetric:
            expected["weight_zero_point"] = shape, (torch.int8,)
        require(module, parts, expected)
        if self.ordered:
            raise ModelNotSupported(f"{module}: actorder in format={self.layout!r} is not supported")
        return IntegerWeight(
            module, {name: parts[name] for name in ("weight", *expected)}, (rows, cols), span, form, ordered=False
        )

    def _scale_shape(self, parts: Mapping[str, Raw], rows: int, groups: int) -> tuple[int, ...]:
        if groups > 1 or "weight_scale" not in parts:
            return rows, groups
        return one_scale(parts["weight_scale"], rows)


@dataclass(frozen=True)
class CompressedTensors:
    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    method = "compressed-tensors"
    companions = frozenset(
        (
            *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
            *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
        )
    )

    @classmethod
    def of(cls, settings: Settings) -> CompressedTensors:
        # "frozen" is what early versions wrote of weights that they had compressed
        settings.choice("quantization_status", "compressed", "frozen", default="compressed")
        settings.within("sparsity_config").choice("format", "dense", default="dense")
        settings.within("transform_config").refuse("config_groups")
        if settings.get("kv_cache_scheme"):
            logger.warning("kv_cache_scheme: keys and values stay as they are, in the model's dtype")
        groups = settings.within("config_groups")
        if not groups.names():
            raise settings.unsupported("config_groups={}", "it must tell how weights are quantised")
        found = tuple(Group.of(groups.within(name), settings.get("format")) for name in groups.names())
        return cls(found, tuple(settings.get("ignore") or ()))

    def weight(self, module: str, parts: Mapping[str, Raw]) -> Weight | None:
        if "weight_packed" not in parts and "weight_scale" not in parts:
            return None
        if _matches(module, self.ignore):
            raise WeightError(f"{module} is quantised, though config.json says that it is not")
        named = [group for group in self.groups if _matches(module, group.targets)]
        for group in (*named, *(group for group in self.groups if "Linear" in group.targets)):
            return group.weight(module, parts)
        raise WeightError(f"{module} is quantised, but config.json does not tell how")


def _matches(module: str, patterns: Sequence[str]) -> bool:
    return any(re.match(p[3:], module) if p.startswith("re:") else p == module for p in patterns)


def _strategy(weights: Settings) -> str:
    return "tensor" if weights.get("group_size") is None else "channel" if weights.get("group_size") == -1 else "group"


def _block(weights: Settings) -> object:
    """Written as [128, 128] or as "128x128"."""
    found = weights.get("block_structure")
    return [int(n) for n in found.split("x") if n.isdigit()] if isinstance(found, str) else found
