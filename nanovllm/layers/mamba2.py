"""Mamba2 (Dao and Gu 2024): a short convolution and a state space recurrence in place of attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanovllm.build_context import BuildContext
from nanovllm.cache_spec import StateSpec
from nanovllm.layers.attention import CachedLayer
from nanovllm.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from nanovllm.layers.ssm_plan import GRID, CellBlock, ScanPlan
from nanovllm.layers.ssm_scan import scan_cells, silu, softplus, update_states
from nanovllm.layers.weight_layer import WeightLayer


@dataclass(frozen=True, slots=True)
class Mamba2Sizes:
    """num_groups: of heads that share B and C. time_step_limit: of dt, after the softplus."""

    hidden_size: int
    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    conv_kernel: int
    rms_norm_eps: float
    conv_bias: bool = True
    proj_bias: bool = False
    time_step_limit: tuple[float, float] = (0.0, float("inf"))

    @property
    def inner_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_size(self) -> int:
        return self.inner_size + 2 * self.num_groups * self.state_size

    @property
    def in_proj_shards(self) -> dict[str | None, int]:
        """Rows of the input projection, in its order."""
        shared = self.num_groups * self.state_size
        return {"gate": self.inner_size, "x": self.inner_size, "B": shared, "C": shared, "dt": self.num_heads}


class Mamba2(WeightLayer, CachedLayer):
    """Keeps for each sequence the convolution's last inputs, as the projection rounded them, and
    the recurrence's state in fp32. What follows the projection is computed in fp32 and rounded
    once, before the output projection.

    dt is limited wherever a token is computed. Hugging Face does so in prompts alone; where the
    limits bind, its text differs from what it would compute for the same tokens in one pass.
    """

    A_log: torch.Tensor
    D: torch.Tensor
    dt_bias: torch.Tensor

    def __init__(self, sizes: Mamba2Sizes, ctx: BuildContext) -> None:
        super().__init__()
        assert ctx.tp.size == 1, "the configuration admits one rank"
        self._sizes = sizes
        self._history = sizes.conv_kernel - 1
        self.in_proj = MergedColumnParallelLinear(sizes.hidden_size, sizes.in_proj_shards, ctx, bias=sizes.proj_bias)
        self.conv1d = CausalConv1d(sizes.conv_size, sizes.conv_kernel, ctx, bias=sizes.conv_bias)
        for name in ("A_log", "D", "dt_bias"):
            self.add_parameter(name, (sizes.num_heads,), ctx.dtype, ctx.device)
        self.norm = GatedRMSNorm(sizes.inner_size, sizes.num_groups, sizes.rms_norm_eps, ctx)
        self.out_proj = RowParallelLinear(sizes.inner_size, sizes.hidden_size, ctx, bias=sizes.proj_bias)
        self.cache_spec = StateSpec(
            shapes=(
                (self._history, sizes.conv_size),
                (sizes.num_heads, sizes.head_dim, sizes.state_size),
            ),
            dtypes=(ctx.hidden_dtype, torch.float32),
            grid=GRID,
        )

    def finalize_weights(self) -> None:
        self._A, self._D, self._dt_bias = -self.A_log.float().exp(), self.D.float(), self.dt_bias.float()

    def bind(self, *caches: torch.Tensor) -> None:
        self._conv_states, self._states = caches

    def forward(self, x: torch.Tensor, plan: ScanPlan) -> torch.Tensor:
        """x [T, hidden] -> [T, hidden]."""
        sizes = self._sizes
        gate, xBC, dt = self.in_proj(x).split((sizes.inner_size, sizes.conv_size, sizes.num_heads), dim=1)
        dt = softplus(dt.float() + self._dt_bias).clamp_(*sizes.time_step_limit)  # [T, H]
        if len(plan.fresh_slots):  # what they hold is another sequence's
            self._conv_states[plan.fresh_slots] = 0
            self._states[plan.fresh_slots] = 0
        buffer = torch.cat([_take(self._conv_states, plan.slots).flatten(0, 1), xBC])  # [B * h + T, C]
        self._conv_states[plan.slots] = _take(buffer, plan.tail)
        y = torch.empty(len(x), sizes.inner_size, dtype=torch.float32, device=x.device)
        if plan.blocks:
            states = _take(self._states, plan.scanned_slots)
            for block in plan.blocks:
                y[block.targets] = _take(self._scan(buffer, dt, states, block).flatten(0, 1), block.sources)
            self._states[plan.scanned_slots] = states
        if plan.update_runs:
            y[plan.update_rows] = self._update(buffer, dt, plan)
        return self.out_proj(self.norm(y, gate))

    def _scan(self, buffer: torch.Tensor, dt: torch.Tensor, states: torch.Tensor, block: CellBlock) -> torch.Tensor:
        """[N, GRID, H * P]."""
        x, B, C = self._convolve(_take(buffer, block.taps))
        dt = _take(dt, block.rows) * block.filled[..., None]
        return scan_cells(x, dt, self._A, B, C, self._D, states[block.states], block.widths).flatten(2)

    def _update(self, buffer: torch.Tensor, dt: torch.Tensor, plan: ScanPlan) -> torch.Tensor:
        """[R, H * P]."""
        x, B, C = (part.squeeze(1) for part in self._convolve(_take(buffer, plan.update_taps)))
        dt = _take(dt, plan.update_rows)
        return update_states(x, dt, self._A, B, C, self._D, self._states, plan.update_runs).flatten(1)

    def _convolve(self, taps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[N, h + G, C] -> x [N, G, H, P], B and C [N, G, K, S]."""
        sizes = self._sizes
        shared = sizes.num_groups * sizes.state_size
        x, B, C = silu(self.conv1d(taps)).split((sizes.inner_size, shared, shared), dim=2)
        groups = (sizes.num_groups, sizes.state_size)
        return x.unflatten(2, (sizes.num_heads, sizes.head_dim)), B.unflatten(2, groups), C.unflatten(2, groups)


class CausalConv1d(WeightLayer):
    """One filter a channel over a token and the `kernel - 1` before it; in fp32."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, channels: int, kernel: int, ctx: BuildContext, *, bias: bool) -> None:
        super().__init__()
        self.add_parameter("weight", (channels, 1, kernel), ctx.dtype, ctx.device)
        self.register_parameter("bias", None)
        if bias:
            self.add_parameter("bias", (channels,), ctx.dtype, ctx.device)

    def finalize_weights(self) -> None:
        self._filters = self.weight.float().squeeze(1).t().contiguous()  # [kernel, C]
        self._bias = self._filters.new_zeros(()) if self.bias is None else self.bias.float()

    def forward(self, taps: torch.Tensor) -> torch.Tensor:
        """[N, kernel - 1 + G, C] -> [N, G, C], fp32."""
        taps = taps.float()
        size = taps.shape[1] - len(self._filters) + 1
        out = torch.addcmul(self._bias, taps[:, :size], self._filters[0])
        for k in range(1, len(self._filters)):
            out.addcmul_(taps[:, k : k + size], self._filters[k])
        return out


class GatedRMSNorm(WeightLayer):
    """RMSNorm of x * silu(gate), each of `groups` parts of a row by itself; in fp32."""

    weight: torch.Tensor

    def __init__(self, size: int, groups: int, eps: float, ctx: BuildContext) -> None:
        super().__init__()
        self._groups, self._eps = groups, eps
        self.add_parameter("weight", (size,), ctx.dtype, ctx.device)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """x [T, size] fp32, gate [T, size] -> [T, size] in gate's dtype."""
        parts = silu(gate.float()).mul_(x).unflatten(1, (self._groups, -1))
        normed = F.rms_norm(parts, parts.shape[2:], None, self._eps).flatten(1)
        return normed.mul_(self.weight).to(gate.dtype)


def _take(source: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """source[rows], which takes torch several times as long."""
    return source.index_select(0, rows.flatten()).unflatten(0, rows.shape)
