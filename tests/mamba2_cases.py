"""Mamba2 layers of random weights, steps of them, and the definition in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from kernels import normal
from torch import nn

from nanovllm.batch import Batch
from nanovllm.build_context import BuildContext
from nanovllm.distributed.group import TPGroup
from nanovllm.layers.mamba2 import Mamba2
from nanovllm.layers.weight_layer import WeightLayer
from nanovllm.ops.base import Ops
from nanovllm.ops.mamba2 import Mamba2Sizes

SIZES = Mamba2Sizes(
    hidden_size=20, num_heads=6, head_dim=8, num_groups=1, state_size=16, conv_kernel=4, rms_norm_eps=1e-3
)
VARIANTS = {
    "plain": SIZES,
    "groups": dataclasses.replace(SIZES, num_groups=3, proj_bias=True),
    "odd": dataclasses.replace(SIZES, num_heads=5, head_dim=3, state_size=7, conv_bias=False, conv_kernel=3),
    "limited": dataclasses.replace(SIZES, time_step_limit=(0.4, 0.9)),
    "no-history": dataclasses.replace(SIZES, conv_kernel=1),
}
SLOTS = 9


def context(ops: Ops, dtype=torch.float32, tp=None, device="cpu") -> BuildContext:
    return BuildContext(torch.device(device), dtype, 4096, tp or TPGroup(), ops)


def make_layer(
    sizes: Mamba2Sizes, ops: Ops, scale: float = 1.0, dtype=torch.float32, device="cpu", **values: float
) -> Mamba2:
    """Random weights, in float64 in layer.exact, and slots full of garbage. values: of whole parameters."""
    layer = Mamba2(sizes, context(ops, dtype, device=device))
    for i, (name, parameter) in enumerate(layer.named_parameters()):
        parameter.copy_(normal(*parameter.shape, seed=i) * scale)
        if name in values:
            parameter.fill_(values[name])
    layer.exact = {name: parameter.double() for name, parameter in layer.named_parameters()}
    for module in layer.modules():
        if isinstance(module, WeightLayer):
            module.finalize_weights()
    forget_everything(layer)
    return layer


def forget_everything(layer: Mamba2) -> None:
    """Slots full of garbage."""
    shapes, dtypes, device = layer.cache_spec.shapes, layer.cache_spec.dtypes, layer.A_log.device
    layer.bind(
        *(torch.full((SLOTS, *s), float("nan"), dtype=d, device=device) for s, d in zip(shapes, dtypes, strict=True))
    )


def only_the_recurrence(layer: Mamba2) -> Mamba2:
    """Without the projections: x is what in_proj would give, [T, width]."""
    layer.in_proj = layer.out_proj = nn.Identity()
    return layer


def width(sizes: Mamba2Sizes) -> int:
    return sum(sizes.in_proj_shards.values())


def make_batch(chunks: list[tuple[int, int, int]], device="cpu") -> Batch:
    """chunks: (slot, first position, tokens)."""
    counts = [count for _, _, count in chunks]
    batch = Batch(
        input_ids=torch.zeros(sum(counts), dtype=torch.int64),
        positions=torch.cat([torch.arange(first, first + count) for _, first, count in chunks]),
        query_start=torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
        seq_lens=torch.tensor([first + count for _, first, count in chunks], dtype=torch.int32),
        slot_mapping=torch.zeros(sum(counts), dtype=torch.int64),
        block_tables=torch.zeros(len(chunks), 1, dtype=torch.int32),
        state_slots=torch.tensor([slot for slot, _, _ in chunks], dtype=torch.int32),
        logits_rows=torch.zeros(0, dtype=torch.int64),
        max_query_len=max(counts),
        max_seq_len=0,
    )
    tensors = {k: v.to(device) for k, v in dataclasses.asdict(batch).items() if isinstance(v, torch.Tensor)}
    return dataclasses.replace(batch, **tensors)


def step(layer: Mamba2, chunks: list[tuple[int, int, torch.Tensor]]) -> list[torch.Tensor]:
    """chunks: (slot, first position, rows); the output of each."""
    batch = make_batch([(slot, first, len(rows)) for slot, first, rows in chunks], chunks[0][2].device)
    out = layer(torch.cat([rows for _, _, rows in chunks]), layer._ops.plan_mamba2(batch, layer._sizes))
    return list(out.split([len(rows) for _, _, rows in chunks]))


def run_steps(layer: Mamba2, inputs: dict[int, torch.Tensor], steps: list[dict[int, int]]) -> dict[int, torch.Tensor]:
    """inputs: {slot: all rows of its sequence}; steps: {slot: tokens of it in this step}."""
    done = dict.fromkeys(inputs, 0)
    outputs: dict[int, list[torch.Tensor]] = {slot: [] for slot in inputs}
    for counts in steps:
        chunks = [(slot, done[slot], inputs[slot][done[slot] : done[slot] + n]) for slot, n in counts.items()]
        for (slot, _, rows), out in zip(chunks, step(layer, chunks), strict=True):
            outputs[slot].append(out)
            done[slot] += len(rows)
    return {slot: torch.cat(parts) for slot, parts in outputs.items()}


def naive(layer: Mamba2, x: torch.Tensor) -> torch.Tensor:
    """The definition, a token at a time, in float64: [T, hidden] -> [T, hidden]."""
    s = layer._sizes
    weights = layer.exact
    zxbcdt = x.double() @ weights["in_proj.weight"].T + weights.get("in_proj.bias", 0)
    gate, xBC, dt = zxbcdt.split((s.inner_size, s.conv_size, s.num_heads), dim=1)
    dt = (dt + weights["dt_bias"]).logaddexp(torch.zeros(())).clamp(*s.time_step_limit)
    padded = F.pad(xBC.T, (s.conv_kernel - 1, 0))
    filtered = F.conv1d(padded, weights["conv1d.weight"], weights.get("conv1d.bias"), groups=s.conv_size).T
    shared = s.num_groups * s.state_size
    xs, B, C = (filtered / (1 + (-filtered).exp())).split((s.inner_size, shared, shared), dim=1)
    xs = xs.view(-1, s.num_heads, s.head_dim)
    B, C = (
        v.view(-1, s.num_groups, s.state_size).repeat_interleave(s.num_heads // s.num_groups, dim=1) for v in (B, C)
    )
    state = torch.zeros(s.num_heads, s.head_dim, s.state_size, dtype=torch.float64)
    y = torch.empty_like(xs)
    for t in range(len(x)):
        decay = torch.exp(-weights["A_log"].exp() * dt[t])
        state = state * decay[:, None, None] + (dt[t, :, None] * xs[t])[..., None] * B[t, :, None]
        y[t] = (state * C[t, :, None]).sum(-1) + weights["D"][:, None] * xs[t]
    gated = (y.flatten(1) * gate / (1 + (-gate).exp())).unflatten(1, (s.num_groups, -1))
    normed = gated / (gated.square().mean(-1, keepdim=True) + s.rms_norm_eps).sqrt()
    return (normed.flatten(1) * weights["norm.weight"]) @ weights["out_proj.weight"].T + weights.get("out_proj.bias", 0)


@st.composite
def schedules(draw):
    """{slot: length} and steps {slot: tokens}, everything computed in the end, in any company."""
    slots = draw(st.permutations(range(1, SLOTS)))[: draw(st.integers(1, 6))]
    lengths = {slot: draw(st.integers(1, 200)) for slot in slots}
    left, steps = dict(lengths), []
    while left:
        members = draw(st.lists(st.sampled_from(sorted(left)), min_size=1, unique=True))
        steps.append(
            {slot: min(left[slot], draw(st.sampled_from([1, 1, 2, 3, 30, 63, 64, 65, 128, 200]))) for slot in members}
        )
        for slot, count in steps[-1].items():
            left[slot] -= count
            if not left[slot]:
                del left[slot]
    return lengths, steps
