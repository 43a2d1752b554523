"""Mamba2 with torch: its bits for prompts that are cut on the grid, and its parts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import normal
from mamba2_cases import SIZES, VARIANTS, make_batch, make_layer, only_the_recurrence, run_steps, step, width

from nanovllm.ops.mamba2 import Mamba2Sizes
from nanovllm.ops.ssm_plan import GRID, plan_scan
from nanovllm.ops.ssm_scan import decay_products, silu, softplus
from nanovllm.ops.torch_mamba2 import causal_conv, gated_rms_norm
from nanovllm.ops.torch_ops import TorchOps

OPS = TorchOps()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("sizes", [SIZES, VARIANTS["groups"], dataclasses.replace(SIZES, num_heads=3, head_dim=16)])
def test_a_cut_between_cells_changes_no_bit_whatever_else_is_in_the_batch(threads, sizes, count):
    layer = only_the_recurrence(make_layer(sizes, OPS))
    lengths = {1: 193, 2: 64, 3: 300, 5: 129, 6: 1, 7: 65, 8: 40}  # cells of one token and partial ones among them
    inputs = {slot: normal(length, width(sizes), seed=slot) for slot, length in lengths.items()}
    random = np.random.default_rng(count)
    threads(count)
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


@pytest.mark.parametrize("count", [1, 2])
def test_published_sizes_keep_their_bits_in_company(threads, count):
    """Granite 4.0 H 350M: other matrix sizes may take other ways through the library."""
    sizes = Mamba2Sizes(20, 48, 32, 1, 128, 4, 1e-5)
    layer = only_the_recurrence(make_layer(sizes, OPS))
    inputs = {slot: normal(150, sizes.inner_size + sizes.conv_size + sizes.num_heads, seed=slot) for slot in (1, 2, 4)}
    threads(count)
    alone = {slot: run_steps(layer, {slot: x}, [{slot: 149}, {slot: 1}])[slot] for slot, x in inputs.items()}
    cut = run_steps(layer, inputs, [{1: 64, 2: 149}, {4: 128, 1: 64}, {2: 1, 4: 21, 1: 21}, {1: 1, 4: 1}])
    for slot in inputs:
        assert torch.equal(cut[slot], alone[slot])


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


def test_the_convolution_state_loses_nothing_in_bfloat16():
    """Chunked and whole prompts round alike: the history is what the projection gave, in its dtype."""
    layers = [only_the_recurrence(make_layer(SIZES, OPS, 0.02, torch.bfloat16)) for _ in range(2)]
    x = normal(130, SIZES.inner_size + SIZES.conv_size + SIZES.num_heads).bfloat16()
    whole = run_steps(layers[0], {1: x}, [{1: 130}])[1]
    assert whole.dtype == torch.bfloat16
    assert torch.equal(run_steps(layers[1], {1: x}, [{1: 64}, {1: 66}])[1], whole)


@pytest.mark.parametrize("kernel", [1, 4])
def test_causal_conv(kernel):
    taps, filters, bias = normal(3, kernel - 1 + 7, 10), normal(kernel, 10, seed=1), normal(10, seed=2)
    wanted = F.conv1d(taps.mT, filters.T[:, None], bias, groups=10).mT
    torch.testing.assert_close(causal_conv(taps, filters, bias), wanted)


@pytest.mark.parametrize("groups", [1, 3])
def test_gated_norm_is_that_of_transformers(groups):
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRMSNormGated

    theirs = GraniteMoeHybridRMSNormGated(24, 24 // groups, 1e-3)
    theirs.weight.data.copy_(normal(24))
    x, gate = normal(5, 24, seed=1) * 0.05, normal(5, 24, seed=2)
    torch.testing.assert_close(gated_rms_norm(x, gate, normal(24), groups, 1e-3), theirs(x, gate))


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
