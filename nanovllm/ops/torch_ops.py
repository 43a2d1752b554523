"""Ops of torch: any device and dtype, and the reference of the others."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from nanovllm.batch import Batch
from nanovllm.cache_spec import StateSpec
from nanovllm.ops import torch_mamba2
from nanovllm.ops.formats import Codes, Format, Packed
from nanovllm.ops.mamba2 import Mamba2Sizes, Mamba2Weights, SumOverRanks
from nanovllm.ops.ssm_plan import GRID, plan_scan
from nanovllm.ops.torch_activation import activate
from nanovllm.ops.torch_quantize import quantize
from nanovllm.ops.torch_sampling import TorchSampling


class TorchOps:
    """The hidden stream has the weights' dtype. On CPUs that multiply bfloat16, weights are packed for oneDNN.

    Packing saves oneDNN from reordering the weight on every call: 1.6x at one row and 1.6x at
    32 on a 576 x 3072 matrix (docs/benchmarks.md).
    """

    name = "torch"
    sampling = TorchSampling()
    embeds_packed = False  # oneDNN's form is its own
    packs_quantized = False
    norms_and_rotates = False

    def hidden_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def packs(self, device: torch.device, dtype: torch.dtype) -> bool:
        return (
            device.type == "cpu"
            and dtype == torch.bfloat16
            and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )

    def packed_numel(self, rows: int, cols: int, dtype: torch.dtype) -> int:
        return rows * cols

    def fuses(self, act: str) -> bool:
        return False

    def pack(self, weight: torch.Tensor, *, gated: bool, out: torch.Tensor | None = None) -> torch.Tensor:
        assert not gated and out is None
        return torch.ops.mkldnn._reorder_linear_weight(weight)

    def zeros(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        raise NotImplementedError

    def codes_bytes(self, form: Format, rows: int, cols: int) -> int:
        raise NotImplementedError

    def pack_codes(self, codes: Codes, first: int, out: torch.Tensor, *, half: int | None = None) -> None:
        raise NotImplementedError

    def quantize(self, weight: torch.Tensor, form: Format) -> Codes:
        return quantize(weight, form)

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor | Packed,
        rows: int,
        bias: torch.Tensor | None,
        act: str | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert act is None and isinstance(packed, torch.Tensor)
        # oneDNN sums a single row in another order; as one of two it gets the bits it has in any batch
        doubled = x.expand(2, -1) if len(x) == 1 else x
        out = torch.ops.mkldnn._linear_pointwise(doubled, packed, bias, "none", [], "")[: len(x)]
        return out if residual is None else residual + out

    def plain_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = F.linear(x, weight, bias)
        return out if residual is None else residual + out

    def activate(self, x: torch.Tensor, act: str, *, gated: bool) -> torch.Tensor:
        return activate(x, act, gated=gated)

    def gated_linear(
        self, x: torch.Tensor, packed: torch.Tensor | Packed, rows: int, bias: torch.Tensor | None, act: str
    ) -> torch.Tensor:
        raise NotImplementedError(act)

    def route(self, scores: torch.Tensor, k: int, *, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
        best, experts = (part[:, :k] for part in scores.sort(dim=-1, descending=True, stable=True))
        weights = best.softmax(dim=-1) if normalise else scores.softmax(dim=-1).gather(1, experts)
        return weights, experts.int()

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
        raise NotImplementedError(act)

    def gather(self, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return F.embedding(rows, table)

    def embed(self, table: torch.Tensor, ids: torch.Tensor, first: int) -> torch.Tensor:
        rows = ids - first
        missing = (rows < 0) | (rows >= len(table))
        return F.embedding(rows.masked_fill(missing, 0), table).masked_fill(missing[:, None], 0.0)

    def embed_packed(
        self, packed: torch.Tensor | Packed, ids: torch.Tensor, first: int, shape: tuple[int, int]
    ) -> torch.Tensor:
        raise NotImplementedError

    def recorder(self) -> None:
        return None

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if weight.dtype != x.dtype:  # Gemma's, in fp32
            return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, eps)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second, *rest = x.float().split(cos.shape[-1], dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, *rest), dim=-1).to(x.dtype)

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
        q, k = self.rms_norm(q, q_weight, eps), self.rms_norm(k, k_weight, eps)
        return self.rotate(q, cos, sin), self.rotate(k, cos, sin)

    def mamba2_states(self, sizes: Mamba2Sizes, dtype: torch.dtype) -> StateSpec:
        history = (sizes.conv_kernel - 1, sizes.conv_size)
        state = (sizes.num_heads, sizes.head_dim, sizes.state_size)
        return StateSpec(shapes=(history, state), dtypes=(dtype, torch.float32), grid=GRID)

    def plan_mamba2(self, batch: Batch, sizes: Mamba2Sizes) -> Any:
        return plan_scan(batch, sizes.conv_kernel - 1)

    def mamba2(
        self,
        projected: torch.Tensor,
        weights: Mamba2Weights,
        conv_states: torch.Tensor,
        states: torch.Tensor,
        plan: Any,
        sum_squares: SumOverRanks | None = None,
    ) -> torch.Tensor:
        return torch_mamba2.mamba2(projected, weights, conv_states, states, plan, sum_squares)
