"""Ops of triton_kernels/: GPUs, with cuBLAS for the matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanovllm.batch import Batch
from nanovllm.cache_spec import StateSpec
from nanovllm.ops import triton_mamba2
from nanovllm.ops.formats import Codes, Format, Packed
from nanovllm.ops.mamba2 import Mamba2Sizes, Mamba2Weights, SumOverRanks
from nanovllm.ops.torch_ops import TorchOps
from nanovllm.ops.triton_packing import codes_of, floats_of, layout_of, pack_codes, widened
from nanovllm.ops.triton_sampling import TritonSampling
from nanovllm.triton_kernels import moe
from nanovllm.triton_kernels.activation import KINDS, activate_gated
from nanovllm.triton_kernels.gather import gather
from nanovllm.triton_kernels.mamba2_plan import Mamba2Plan, plan_mamba2
from nanovllm.triton_kernels.norm import layer_norm, rms_norm
from nanovllm.triton_kernels.packed_codes import PackedCodes
from nanovllm.triton_kernels.quantized_linear import MOST_ROWS, quantized_linear
from nanovllm.triton_kernels.quantized_rows import gather_rows
from nanovllm.triton_kernels.rotary import norm_and_rotate, rotate


class TritonOps(TorchOps):
    """torch's operations, but for those that a kernel of ours does in one launch instead of several.

    The hidden stream has the weights' dtype; each operation computes in fp32 and rounds once.
    """

    name = "triton"
    packs_quantized = True
    norms_and_rotates = True
    sampling = TritonSampling()
    expert_rows: int | None = None  # of a tile of one expert's tokens; None: by how many tokens there are
    quantized_tokens: int | None = None  # the same of a quantised layer's tile
    most_quantized_tokens = MOST_ROWS  # that codes are widened for in registers

    def packs(self, device: torch.device, dtype: torch.dtype) -> bool:
        return False

    def pack(self, weight: torch.Tensor, *, gated: bool, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows that are not quantised, of a weight that is: as they are."""
        assert out is not None
        return out[: weight.numel()].view(weight.shape).copy_(weight)

    def zeros(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    def codes_bytes(self, form: Format, rows: int, cols: int) -> int:
        return layout_of(form).packed_bytes(rows, cols)

    def pack_codes(self, codes: Codes, first: int, out: torch.Tensor, *, half: int | None = None) -> None:
        pack_codes(codes, first, out, half)

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor | Packed,
        rows: int,
        bias: torch.Tensor | None,
        act: str | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows of different forms are products of their own."""
        assert isinstance(packed, Packed)
        x = x if packed.columns is None else x.index_select(1, packed.columns)
        if self._multiplies_floats(packed, len(x)):
            weight = widened(packed, (rows, x.shape[1]), x.dtype, gated=False)
            out = self.plain_linear(x, weight, bias, residual)
            return out if act is None else self.activate(out, act, gated=False)
        out = x.new_empty(len(x), rows) if residual is None else residual.contiguous()
        for segment in packed.segments:
            codes, mine = codes_of(packed, segment), segment.rows
            if codes is None:
                weight = floats_of(packed, segment, x.shape[1], x.dtype)
                part = self.plain_linear(x, weight, None if bias is None else bias[mine])
                part = part if act is None else self.activate(part, act, gated=False)
                out[:, mine] = part if residual is None else out[:, mine] + part
            else:
                kind = "none" if act is None else KINDS[act]
                quantized_linear(x, codes, bias, out, mine, kind, residual, tokens=self.quantized_tokens)
        return out

    def gated_linear(
        self, x: torch.Tensor, packed: torch.Tensor | Packed, rows: int, bias: torch.Tensor | None, act: str
    ) -> torch.Tensor:
        assert isinstance(packed, Packed)
        x = x if packed.columns is None else x.index_select(1, packed.columns)
        if self._multiplies_floats(packed, len(x)):
            weight = widened(packed, (rows, x.shape[1]), x.dtype, gated=True)
            return self.activate(self.plain_linear(x, weight, bias), act, gated=True)
        (segment,) = packed.segments
        codes, out = codes_of(packed, segment), x.new_empty(len(x), rows // 2)
        assert codes is not None
        quantized_linear(
            *(x, codes, bias, out, slice(0, rows // 2), KINDS[act]), gated=True, tokens=self.quantized_tokens
        )
        return out

    def _multiplies_floats(self, packed: Packed, tokens: int) -> bool:
        """Whether codes would be widened again and again for many tokens, or there are none."""
        return tokens > self.most_quantized_tokens or all(segment.form is None for segment in packed.segments)

    def embed_packed(
        self, packed: torch.Tensor | Packed, ids: torch.Tensor, first: int, shape: tuple[int, int]
    ) -> torch.Tensor:
        assert isinstance(packed, Packed) and packed.columns is None
        (segment,) = packed.segments
        codes, dtype = codes_of(packed, segment), packed.dtype
        if codes is None:
            return self.embed(floats_of(packed, segment, shape[1], dtype), ids, first)
        return gather_rows(codes, shape, ids, first, dtype)

    def plain_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The residual is where the product's sums begin, in fp32 and in its own memory: one launch and one
        rounding, where torch would first copy it elsewhere. With a bias, which cuBLAS adds in its place, it is
        added afterwards."""
        if residual is None:
            return F.linear(x, weight, bias)
        if bias is None:
            return residual.addmm_(x, weight.t())
        return residual.add_(F.linear(x, weight, bias))

    def activate(self, x: torch.Tensor, act: str, *, gated: bool) -> torch.Tensor:
        return activate_gated(x, act) if gated else super().activate(x, act, gated=False)

    def gather(self, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return gather(table, rows)

    def embed(self, table: torch.Tensor, ids: torch.Tensor, first: int) -> torch.Tensor:
        return gather(table, ids, first)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return rms_norm(x, weight, eps)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        return layer_norm(x, weight, bias, eps)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rotate(x, cos, sin)

    def norm_and_rotate(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return norm_and_rotate(q, k, q_weight, k_weight, eps, cos, sin)

    def fuses(self, act: str) -> bool:
        return act in KINDS

    def route(self, scores: torch.Tensor, k: int, *, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return moe.route(scores, k, normalise=normalise)

    def mixture(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        chosen: torch.Tensor,
        gate_up: torch.Tensor | Packed,
        down: torch.Tensor | Packed,
        inner: int,
        act: str,
        first: int = 0,
    ) -> torch.Tensor:
        both = _experts(gate_up, x.shape[1], x.dtype), _experts(down, inner, x.dtype)
        return moe.mixture(x, weights, chosen, *both, inner, act, first, self.expert_rows)

    def mamba2_states(self, sizes: Mamba2Sizes, dtype: torch.dtype) -> StateSpec:
        return triton_mamba2.mamba2_states(sizes, dtype)

    def plan_mamba2(self, batch: Batch, sizes: Mamba2Sizes) -> Mamba2Plan:
        return plan_mamba2(batch)

    def mamba2(
        self,
        projected: torch.Tensor,
        weights: Mamba2Weights,
        conv_states: torch.Tensor,
        states: torch.Tensor,
        plan: Mamba2Plan,
        sum_squares: SumOverRanks | None = None,
    ) -> torch.Tensor:
        return triton_mamba2.mamba2(projected, weights, conv_states, states, plan, sum_squares)


def _experts(weight: torch.Tensor | Packed, cols: int, dtype: torch.dtype) -> torch.Tensor | PackedCodes:
    if isinstance(weight, torch.Tensor):
        return weight
    (segment,) = weight.segments
    return codes_of(weight, segment) or floats_of(weight, segment, cols, dtype)
