"""Mamba2 between its two projections with Triton kernels.

A step of decoding sequences takes three launches: the convolution, the recurrence's update and the gated norm. Where
there are prompts, three more scan these before the update.
"""

from __future__ import annotations

import torch

from nanovllm.cache_spec import StateSpec
from nanovllm.ops.mamba2 import Mamba2Sizes, Mamba2Weights, SumOverRanks
from nanovllm.triton_kernels.causal_conv import convolve
from nanovllm.triton_kernels.gated_norm import gate_and_square, gated_norm, scale_rows
from nanovllm.triton_kernels.mamba2_plan import CELL, Mamba2Plan
from nanovllm.triton_kernels.ssm_scan import scan
from nanovllm.triton_kernels.ssm_update import update


def mamba2_states(sizes: Mamba2Sizes, dtype: torch.dtype) -> StateSpec:
    history = (sizes.conv_kernel - 1, sizes.conv_size)
    state = (sizes.num_heads, sizes.head_dim, sizes.state_size)
    return StateSpec(shapes=(history, state), dtypes=(dtype, torch.float32), grid=CELL)


def mamba2(
    projected: torch.Tensor,  # [T, gate | x | B | C | dt]
    weights: Mamba2Weights,
    conv_states: torch.Tensor,  # [slots, h, C], updated in place
    states: torch.Tensor,  # [slots, H, P, S], updated in place
    plan: Mamba2Plan,
    sum_squares: SumOverRanks | None = None,
    *,
    in_cells: bool = True,
) -> torch.Tensor:
    """[T, H * P], in the dtype of `projected`, in which x, B and C are rounded behind the convolution too.

    in_cells: else tokens of prompts go one after the other, as those of decoding sequences do.
    """
    sizes = weights.sizes
    inner, groups, limits = sizes.inner_size, sizes.num_groups, sizes.time_step_limit
    mixed = convolve(projected, inner, weights.filters, weights.conv_bias, conv_states, plan)
    y = torch.empty(len(projected), inner, dtype=torch.float32, device=projected.device)
    recurrence = projected, mixed, weights.A, weights.D, weights.dt_bias, limits, groups, states, y, plan
    if in_cells and plan.prompts is not None:
        scan(*recurrence, plan.prompts)
    update(*recurrence, every=not in_cells)
    gate = projected[:, :inner]
    if sum_squares is None:
        return gated_norm(y, gate, weights.norm, groups, sizes.rms_norm_eps)
    squares = sum_squares(gate_and_square(y, gate))
    return scale_rows(y, squares, weights.norm, sizes.norm_size, sizes.rms_norm_eps, projected.dtype)
