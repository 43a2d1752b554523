"""Mamba2 between its two projections with torch: cells of tokens by matrix products, the rest token by token.

What follows the input projection is computed in fp32 and rounded once, for the output projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanovllm.ops.mamba2 import Mamba2Weights, SumOverRanks
from nanovllm.ops.ssm_plan import CellBlock, ScanPlan
from nanovllm.ops.ssm_scan import scan_cells, silu, softplus, update_states


def mamba2(
    projected: torch.Tensor,  # [T, gate | x | B | C | dt]
    weights: Mamba2Weights,
    conv_states: torch.Tensor,  # [slots, h, C], updated in place
    states: torch.Tensor,  # [slots, H, P, S], updated in place
    plan: ScanPlan,
    sum_squares: SumOverRanks | None = None,
) -> torch.Tensor:
    """[T, H * P], in the dtype of `projected`."""
    sizes = weights.sizes
    gate, xBC, dt = projected.split((sizes.inner_size, sizes.conv_size, sizes.num_heads), dim=1)
    dt = softplus(dt.float() + weights.dt_bias).clamp_(*sizes.time_step_limit)  # [T, H]
    if len(plan.fresh_slots):  # what they hold is another sequence's
        conv_states[plan.fresh_slots] = 0
        states[plan.fresh_slots] = 0
    buffer = torch.cat([_take(conv_states, plan.slots).flatten(0, 1), xBC])  # [B * h + T, C]
    conv_states[plan.slots] = _take(buffer, plan.tail)
    y = torch.empty(len(projected), sizes.inner_size, dtype=torch.float32, device=projected.device)
    if plan.blocks:
        scanned = _take(states, plan.scanned_slots)
        for block in plan.blocks:
            y[block.targets] = _take(_scan(weights, buffer, dt, scanned, block).flatten(0, 1), block.sources)
        states[plan.scanned_slots] = scanned
    if plan.update_runs:
        y[plan.update_rows] = _update(weights, buffer, dt, states, plan)
    if sum_squares is not None:
        gated = silu(gate.float()).mul_(y)
        mean = sum_squares(gated.square().sum(1, keepdim=True)) / sizes.norm_size
        return (gated * (mean + sizes.rms_norm_eps).rsqrt() * weights.norm).to(projected.dtype)
    return gated_rms_norm(y, gate, weights.norm, sizes.num_groups, sizes.rms_norm_eps).to(projected.dtype)


def _scan(
    weights: Mamba2Weights, buffer: torch.Tensor, dt: torch.Tensor, states: torch.Tensor, block: CellBlock
) -> torch.Tensor:
    """[N, GRID, H * P]."""
    x, B, C = _convolve(weights, _take(buffer, block.taps))
    dt = _take(dt, block.rows) * block.filled[..., None]
    return scan_cells(x, dt, weights.A, B, C, weights.D, states[block.states], block.widths).flatten(2)


def _update(
    weights: Mamba2Weights, buffer: torch.Tensor, dt: torch.Tensor, states: torch.Tensor, plan: ScanPlan
) -> torch.Tensor:
    """[R, H * P]."""
    x, B, C = (part.squeeze(1) for part in _convolve(weights, _take(buffer, plan.update_taps)))
    dt = _take(dt, plan.update_rows)
    return update_states(x, dt, weights.A, B, C, weights.D, states, plan.update_runs).flatten(1)


def _convolve(weights: Mamba2Weights, taps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N, h + G, C] -> x [N, G, H, P], B and C [N, G, K, S]."""
    sizes = weights.sizes
    shared = sizes.num_groups * sizes.state_size
    filtered = silu(causal_conv(taps, weights.filters, weights.conv_bias))
    x, B, C = filtered.split((sizes.inner_size, shared, shared), dim=2)
    groups = (sizes.num_groups, sizes.state_size)
    return x.unflatten(2, (sizes.num_heads, sizes.head_dim)), B.unflatten(2, groups), C.unflatten(2, groups)


def causal_conv(taps: torch.Tensor, filters: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """One filter a channel over a token and the `kernel - 1` before it: taps [N, kernel - 1 + G, C], filters
    [kernel, C], bias [C] -> [N, G, C], fp32."""
    taps = taps.float()
    size = taps.shape[1] - len(filters) + 1
    out = torch.addcmul(bias, taps[:, :size], filters[0])
    for k in range(1, len(filters)):
        out.addcmul_(taps[:, k : k + size], filters[k])
    return out


def gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """RMSNorm of x * silu(gate), each of `groups` parts of a row by itself; fp32 [T, size]."""
    parts = silu(gate.float()).mul_(x).unflatten(1, (groups, -1))
    return F.rms_norm(parts, parts.shape[2:], None, eps).flatten(1).mul_(weight)


def _take(source: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """source[rows], which takes torch several times as long."""
    return source.index_select(0, rows.flatten()).unflatten(0, rows.shape)
