"""Mamba2 against a recurrence of a token at a time in float64, and its bits in any company."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nanovllm.attention.reference import ReferenceAttention
from nanovllm.batch import Batch
from nanovllm.build_context import BuildContext
from nanovllm.distributed.group import TPGroup
from nanovllm.layers.mamba2 import CausalConv1d, GatedRMSNorm, Mamba2, Mamba2Sizes
from nanovllm.layers.ssm_plan import GRID, plan_scan
from nanovllm.layers.ssm_scan import decay_products, silu, softplus
from nanovllm.layers.weight_layer import WeightLayer
from nanovllm.weights.loader import fill_dummy_weights

CPU = torch.device("cpu")
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


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def context(dtype=torch.float32, tp=None) -> BuildContext:
    return BuildContext(CPU, dtype, ReferenceAttention(), 4096, tp or TPGroup())


def make_layer(sizes: Mamba2Sizes, scale: float = 1.0) -> Mamba2:
    """Random weights, and slots full of garbage."""
    layer = Mamba2(sizes, context())
    fill_dummy_weights(layer)
    for i, parameter in enumerate(layer.parameters()):
        parameter.copy_(normal(*parameter.shape, seed=i) * scale)
    for module in layer.modules():
        if isinstance(module, WeightLayer):
            module.finalize_weights()
    spec = layer.cache_spec
    layer.bind(*(torch.full((SLOTS, *s), float("nan"), dtype=d) for s, d in zip(spec.shapes, spec.dtypes, strict=True)))
    return layer


def only_the_recurrence(layer: Mamba2) -> Mamba2:
    """Without the projections, whose fp32 sums depend on the number of rows: x is what in_proj would give."""
    layer.in_proj = layer.out_proj = nn.Identity()
    return layer


def make_batch(chunks: list[tuple[int, int, int]]) -> Batch:
    """chunks: (slot, first position, tokens)."""
    counts = [count for _, _, count in chunks]
    return Batch(
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


def step(layer: Mamba2, chunks: list[tuple[int, int, torch.Tensor]]) -> list[torch.Tensor]:
    """chunks: (slot, first position, rows); the output of each."""
    batch = make_batch([(slot, first, len(rows)) for slot, first, rows in chunks])
    out = layer(torch.cat([rows for _, _, rows in chunks]), plan_scan(batch, layer._sizes.conv_kernel - 1))
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
    weights = {name: p.double() for name, p in layer.named_parameters()}
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


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=15, deadline=None)
@given(schedule=schedules())
def test_any_mix_of_chunks_resumes_exactly(variant, schedule):
    lengths, steps = schedule
    layer = make_layer(VARIANTS[variant], scale=0.7)
    inputs = {slot: normal(length, 20, seed=slot) for slot, length in lengths.items()}
    outputs = run_steps(layer, inputs, steps)
    for slot, x in inputs.items():
        torch.testing.assert_close(outputs[slot], naive(layer, x).float(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sizes", [SIZES, VARIANTS["groups"], dataclasses.replace(SIZES, num_heads=3, head_dim=16)])
def test_a_cut_between_cells_changes_no_bit_whatever_else_is_in_the_batch(sizes, threads):
    layer = only_the_recurrence(make_layer(sizes))
    width = sizes.inner_size + sizes.conv_size + sizes.num_heads
    lengths = {1: 193, 2: 64, 3: 300, 5: 129, 6: 1, 7: 65, 8: 40}  # cells of one token and partial ones among them
    inputs = {slot: normal(length, width, seed=slot) for slot, length in lengths.items()}
    random = np.random.default_rng(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = {}
        for slot, x in inputs.items():
            [rows] = step(layer, [(slot, 0, x)])
            alone[slot] = [rows, *(states[slot].clone() for states in (layer._conv_states, layer._states))]
        for _ in range(20):
            left, steps = dict(lengths), []
            while left:
                members = random.permutation(sorted(left))[: random.integers(1, len(left) + 1)]
                steps.append({int(slot): min(left[slot], GRID * int(random.integers(1, 4))) for slot in members})
                left = {slot: n - steps[-1].get(slot, 0) for slot, n in left.items() if n > steps[-1].get(slot, 0)}
            outputs = run_steps(layer, inputs, steps)
            for slot, (rows, *states) in alone.items():
                assert torch.equal(outputs[slot], rows)
                assert torch.equal(layer._conv_states[slot], states[0])
                assert torch.equal(layer._states[slot], states[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_published_sizes_keep_their_bits_in_company(threads):
    """Granite 4.0 H 350M: other matrix sizes may take other ways through the library."""
    sizes = Mamba2Sizes(20, 48, 32, 1, 128, 4, 1e-5)
    layer = only_the_recurrence(make_layer(sizes))
    inputs = {slot: normal(150, sizes.inner_size + sizes.conv_size + sizes.num_heads, seed=slot) for slot in (1, 2, 4)}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = {slot: run_steps(layer, {slot: x}, [{slot: 149}, {slot: 1}])[slot] for slot, x in inputs.items()}
        cut = run_steps(layer, inputs, [{1: 64, 2: 149}, {4: 128, 1: 64}, {2: 1, 4: 21, 1: 21}, {1: 1, 4: 1}])
    finally:
        torch.set_num_threads(before)
    for slot in inputs:
        assert torch.equal(cut[slot], alone[slot])


@pytest.mark.parametrize(("dt_bias", "A_log"), [(40.0, 5.0), (-30.0, -8.0), (60.0, -8.0), (-3.0, 5.0)])
def test_extreme_decays_neither_overflow_nor_lose_what_is_remembered(dt_bias, A_log):
    """exp(sum_i) / exp(sum_j) overflows within a few tokens; exp(sum_i - sum_j) loses small
    differences of large sums once a single step has forgotten everything."""
    layer = make_layer(SIZES, scale=0.7)
    layer.A_log.fill_(A_log)
    layer.dt_bias.fill_(dt_bias)
    layer.finalize_weights()
    x = normal(150, 20)
    x[40] *= 100  # one large step of time among small ones, for some heads
    [out] = step(layer, [(1, 0, x)])
    assert out.isfinite().all()
    torch.testing.assert_close(out, naive(layer, x).float(), rtol=2e-4, atol=2e-4)


def test_an_infinite_sequence_spoils_only_itself():
    """Places of a cell that hold no token stood for another sequence's: zero times infinity."""
    layer = only_the_recurrence(make_layer(SIZES))
    width = SIZES.inner_size + SIZES.conv_size + SIZES.num_heads
    spoilt, sound = normal(70, width), normal(70, width, seed=1)
    [alone] = step(layer, [(1, 0, sound)])
    spoilt[30:] = float("inf")
    for chunks in ([(2, 0, spoilt), (1, 0, sound)], [(1, 0, sound), (2, 0, spoilt)]):
        out = step(layer, chunks)[[slot for slot, _, _ in chunks].index(1)]
        assert torch.equal(out, alone)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300)), min_size=1, max_size=8), st.integers(0, 4))
def test_every_token_is_computed_once_and_in_its_cell(parts, history):
    chunks = [(9 - i, first, count) for i, (first, count) in enumerate(parts)]
    batch = make_batch(chunks)
    plan = plan_scan(batch, history)
    seen = plan.update_rows.tolist()
    for block in plan.blocks:
        assert block.rows.shape == block.filled.shape == (sum(block.widths), GRID)
        assert torch.equal(block.rows.flatten()[block.sources], block.targets)
        assert torch.equal(batch.positions[block.rows][block.filled] % GRID, block.sources % GRID)
        for rows, filled in zip(block.rows, block.filled, strict=True):
            assert len(set((batch.positions[rows[filled]] // GRID).tolist())) == 1
        seen += block.targets.tolist()
    assert sorted(seen) == list(range(len(batch.positions)))
    assert plan.fresh_slots.tolist() == [slot for slot, first, _ in chunks if first == 0]
    slots = [slot for start, first, last in plan.update_runs for slot in range(start, start + last - first)]
    owners = [slot for slot, _, count in chunks for _ in range(count)]
    assert slots == [owners[row] for row in plan.update_rows]
    assert slots == sorted(slots)  # so that the runs are long


def test_the_state_is_declared_with_its_grid():
    spec = Mamba2(SIZES, context(torch.bfloat16)).cache_spec
    assert spec.shapes == ((3, 6 * 8 + 2 * 16), (6, 8, 16))
    assert spec.dtypes == (torch.bfloat16, torch.float32)
    assert spec.grid == 64


def test_more_than_one_rank_is_not_admitted():
    with pytest.raises(AssertionError, match="one rank"):
        Mamba2(SIZES, context(tp=TPGroup(0, 2)))


def test_the_convolution_state_loses_nothing_in_bfloat16():
    """Chunked and whole prompts round alike: the history is what the projection gave, in its dtype."""
    layers = []
    for _ in range(2):
        layer = Mamba2(SIZES, context(torch.bfloat16))
        fill_dummy_weights(layer)
        spec = layer.cache_spec
        layer.bind(*(torch.zeros(SLOTS, *s, dtype=d) for s, d in zip(spec.shapes, spec.dtypes, strict=True)))
        layers.append(only_the_recurrence(layer))
    x = normal(130, SIZES.inner_size + SIZES.conv_size + SIZES.num_heads).bfloat16()
    whole = run_steps(layers[0], {1: x}, [{1: 130}])[1]
    assert whole.dtype == torch.bfloat16
    assert torch.equal(run_steps(layers[1], {1: x}, [{1: 64}, {1: 66}])[1], whole)


@pytest.mark.parametrize("kernel", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_causal_conv(kernel, bias):
    layer = CausalConv1d(10, kernel, context(), bias=bias)
    for i, parameter in enumerate(layer.parameters()):
        parameter.copy_(normal(*parameter.shape, seed=i))
    layer.finalize_weights()
    taps = normal(3, kernel - 1 + 7, 10)
    wanted = F.conv1d(taps.mT, layer.weight, layer.bias, groups=10).mT
    torch.testing.assert_close(layer(taps), wanted)


@pytest.mark.parametrize("groups", [1, 3])
def test_gated_norm_is_that_of_transformers(groups):
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRMSNormGated

    layer, theirs = GatedRMSNorm(24, groups, 1e-3, context()), GraniteMoeHybridRMSNormGated(24, 24 // groups, 1e-3)
    layer.load_weight("weight", normal(24), None)
    theirs.weight.data.copy_(normal(24))
    x, gate = normal(5, 24, seed=1) * 0.05, normal(5, 24, seed=2)
    torch.testing.assert_close(layer(x, gate), theirs(x, gate))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 2, 8, 64]), st.integers(0, 2**31))
def test_decay_products(size, seed):
    decays = torch.rand(3, size, generator=torch.Generator().manual_seed(seed))
    wanted = torch.zeros(3, size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(i + 1):
            wanted[:, i, j] = decays[:, j + 1 : i + 1].double().prod(1)
    torch.testing.assert_close(decay_products(decays).double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("ours", "torchs"), [(silu, F.silu), (softplus, F.softplus)])
def test_activations_have_one_result_for_an_element_wherever_it_stands(ours, torchs):
    """torch's own compute the end of a vector in other bits than its middle."""
    x = torch.cat([normal(1000) * 4, torch.tensor([-200.0, -90.0, 0.0, 20.5, 90.0, 200.0])])
    torch.testing.assert_close(ours(x), torchs(x))
    for length in (1, 3, 15, 17, 31, 33):
        for start in range(0, 900, 50):
            part = slice(start, start + length)
            assert torch.equal(ours(x[part].clone()), ours(x)[part])
