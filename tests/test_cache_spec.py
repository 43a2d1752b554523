"""plan_cache: how memory becomes state slots and pages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.cache_spec import PagedKVSpec, StateSpec, plan_cache
from nanovllm.errors import ConfigError

KV = PagedKVSpec(num_kv_heads=2, head_dim=8, dtype=torch.float32)
PAGE = 2 * 16 * 2 * 8 * 4  # K and V of 16 tokens
STATE = StateSpec(shapes=((3, 4), (5,)), dtypes=(torch.float32, torch.bfloat16))
SLOT = 3 * 4 * 4 + 5 * 2


def plan(specs, memory, *, max_num_seqs=4, max_blocks=100, **options):
    return plan_cache(specs, memory, block_size=16, max_num_seqs=max_num_seqs, max_blocks=max_blocks, **options)


def test_bytes_of_the_specs():
    assert KV.block_bytes(16) == PAGE
    assert PagedKVSpec(2, 8, torch.bfloat16).block_bytes(32) == PAGE
    assert STATE.slot_bytes == SLOT


def test_pages_fill_the_memory_and_page_0_is_one_of_them():
    found = plan([KV, KV], 10 * 2 * PAGE + PAGE)
    assert (found.num_blocks, found.num_slots, found.num_bytes) == (10, 0, 10 * 2 * PAGE)


def test_no_more_pages_than_could_be_used():
    assert plan([KV], 10**9, max_blocks=7).num_blocks == 8


def test_a_slot_for_each_sequence_and_slot_0():
    found = plan([KV, STATE, STATE], 10 * PAGE, max_num_seqs=4)
    assert (found.num_slots, found.num_blocks) == (5, 9)
    assert found.num_bytes == 5 * 2 * SLOT + 9 * PAGE


def test_snapshots_double_the_slots():
    assert plan([KV, STATE], 10**6, snapshots=True).num_slots == 9
    assert plan([STATE], 9 * SLOT, snapshots=True).num_slots == 9
    assert plan([KV], 10**6, snapshots=True).num_slots == 0


def test_slots_take_half_of_the_memory_at_most():
    """With 256 sequences and 21 MiB a state, a model of 350M parameters did not start on 8 GiB."""
    large = StateSpec(shapes=((100, PAGE),), dtypes=(torch.float32,))
    found = plan([KV, large], 12 * 400 * PAGE, max_num_seqs=256, max_blocks=10**6)
    assert (found.num_slots, found.num_blocks) == (6, 6 * 400)
    assert plan([large], 12 * 400 * PAGE, max_num_seqs=256).num_slots == 12


def test_the_window_is_the_longest_one_if_no_layer_sees_all():
    short, long = (PagedKVSpec(2, 8, torch.float32, window) for window in (32, 64))
    assert plan([short, long], 10**6).window == 64
    assert plan([short, KV], 10**6).window is None
    assert plan([STATE], 10**6).window is None


@pytest.mark.parametrize(("blocks", "longest"), [(14, None), (13, 13 * 16)])
def test_windowed_sequences_of_any_length_fit_beside_a_chunk(blocks, longest):
    windowed = PagedKVSpec(2, 8, torch.float32, window=64)
    found = plan([windowed], 10**9, num_blocks=blocks)
    assert found.longest_sequence(16, max_num_batched_tokens=128) == longest
    assert plan([KV], 10**9, num_blocks=100).longest_sequence(16, 128) == 1600


def test_states_are_captured_on_pages_and_grid_when_pages_cost_as_much():
    state = StateSpec(shapes=((100, 64),), dtypes=(torch.float32,), grid=24)
    found = plan([KV, state], 10**8)
    assert (found.state_grid, found.chunk_grid) == (48, 24)
    assert found.snapshot_interval == 100 * 64 * 4 // (PAGE // 16) // 48 * 48
    assert plan([KV, STATE], 10**6).snapshot_interval == 16  # not less than the grid


def test_two_pages_are_the_least():
    assert plan([KV], 2 * PAGE).num_blocks == 2
    with pytest.raises(ConfigError, match=f"{2 * PAGE - 1:,} bytes.*{PAGE:,}"):
        plan([KV], 2 * PAGE - 1)


def test_memory_without_a_page_is_refused_with_numbers():
    memory = 2 * PAGE - 1 + 5 * SLOT
    with pytest.raises(ConfigError, match=f"{memory:,} bytes.*5 state slots take {5 * SLOT:,}.*{PAGE:,}"):
        plan([KV, STATE], memory)
    with pytest.raises(ConfigError, match=f"{SLOT:,} bytes for recurrent states.*a state takes {SLOT:,}"):
        plan([KV, STATE], 2 * SLOT)


def test_a_fixed_number_of_pages_is_taken_beside_page_0():
    found = plan([KV], 11 * PAGE, num_blocks=10)
    assert (found.num_blocks, found.num_bytes) == (11, 11 * PAGE)
    assert plan([KV], 10**9, num_blocks=10, max_blocks=5).num_blocks == 11


def test_a_fixed_number_of_pages_that_does_not_fit_is_refused_with_numbers():
    with pytest.raises(ConfigError, match=f"num_kvcache_blocks=11 needs {12 * PAGE:,} bytes.*{11 * PAGE:,}"):
        plan([KV], 11 * PAGE, num_blocks=11)
    with pytest.raises(ConfigError, match=f"{SLOT:,} bytes for recurrent states"):
        plan([KV, STATE], 2 * PAGE + SLOT, num_blocks=1)


def test_models_of_state_alone_have_pages_that_cost_nothing():
    found = plan([STATE], 5 * SLOT, max_blocks=7)
    assert (found.num_slots, found.num_blocks, found.num_bytes) == (5, 8, 5 * SLOT)
    assert plan([STATE], 5 * SLOT, max_blocks=7, num_blocks=3).num_blocks == 4
    assert plan([STATE], 5 * SLOT, max_blocks=7, num_blocks=30).num_blocks == 31


@given(
    st.lists(st.sampled_from([KV, STATE]), min_size=1, max_size=5),
    st.integers(-100, 200_000),
    st.integers(1, 9),
    st.integers(1, 50),
    st.none() | st.integers(1, 60),
    st.booleans(),
)
def test_every_plan_fits_and_is_the_largest(specs, memory, max_num_seqs, max_blocks, num_blocks, snapshots):
    page = sum(PAGE for spec in specs if spec is KV)
    slot = sum(SLOT for spec in specs if spec is STATE)
    wanted = (num_blocks or max_blocks) + 1
    most = max_num_seqs * (2 if snapshots else 1) + 1 if slot else 0
    try:
        found = plan(
            specs, memory, max_num_seqs=max_num_seqs, max_blocks=max_blocks, num_blocks=num_blocks, snapshots=snapshots
        )
    except ConfigError:
        least = 2 * page if num_blocks is None else wanted * page
        assert memory < max(least + 2 * slot, 4 * slot, least + most * slot)
        return
    assert found.num_bytes == found.num_slots * slot + found.num_blocks * page <= memory
    assert found.num_slots == most or 2 <= found.num_slots < most
    assert 2 <= found.num_blocks <= wanted
    assert found.num_blocks == wanted or (num_blocks is None and found.num_bytes + page > memory)
