"""TritonOps that multiply many tokens by weights of 8 bits in 8 bits."""

from __future__ import annotations

import torch

from nanovllm.ops.formats import E4M3_128, Q8_128, Packed
from nanovllm.ops.triton_ops import TritonOps
from nanovllm.ops.triton_packing import codes_of
from nanovllm.triton_kernels.activation import KINDS
from nanovllm.triton_kernels.eight_bit_activations import quantize_activations
from nanovllm.triton_kernels.eight_bit_linear import eight_bit_linear

_FROM = {Q8_128: (8, 0), E4M3_128: (8, 9)}  # compute capability of tensor cores that multiply such codes
_CODES = {Q8_128: torch.int8, E4M3_128: torch.float8_e4m3fn}


class EightBitTritonOps(TritonOps):
    """What is not of these forms, or of tokens so few that reading weights takes the time, is as with TritonOps: so are
    mixtures of experts, and float8 where tensor cores do not have it."""

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor | Packed,
        rows: int,
        bias: torch.Tensor | None,
        act: str | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert isinstance(packed, Packed)
        if not self._takes(packed, x):
            return super().linear(x, packed, rows, bias, act, residual)
        out = x.new_empty(len(x), rows) if residual is None else residual.contiguous()
        return self._product(x, packed, bias, out, "none" if act is None else KINDS[act], residual)

    def gated_linear(
        self, x: torch.Tensor, packed: torch.Tensor | Packed, rows: int, bias: torch.Tensor | None, act: str
    ) -> torch.Tensor:
        assert isinstance(packed, Packed)
        if not self._takes(packed, x):
            return super().gated_linear(x, packed, rows, bias, act)
        return self._product(x, packed, bias, x.new_empty(len(x), rows // 2), KINDS[act], gated=True)

    def _takes(self, packed: Packed, x: torch.Tensor) -> bool:
        (form, *others) = {segment.form for segment in packed.segments}
        if others or form not in _FROM or len(x) <= self.most_quantized_tokens:
            return False
        return x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= _FROM[form]

    def _product(
        self,
        x: torch.Tensor,
        packed: Packed,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        kind: str,
        residual: torch.Tensor | None = None,
        *,
        gated: bool = False,
    ) -> torch.Tensor:
        x = x if packed.columns is None else x.index_select(1, packed.columns)
        form = packed.segments[0].form
        assert form is not None
        codes = quantize_activations(x, _CODES[form])
        for segment in packed.segments:
            weight = codes_of(packed, segment)
            assert weight is not None
            part = slice(0, out.shape[1]) if gated else segment.rows
            eight_bit_linear(codes, weight, bias, out, part, kind, residual, gated=gated)
        return out
