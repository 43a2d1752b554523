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


def plan(specs, memory, *, max_num_seqs=4, max_blocks=100, num_blocks=None):
    return plan_cache(
        specs, memory, block_size=16, max_num_seqs=max_num_seqs, max_blocks=max_blocks, num_blocks=num_blocks
    )


def test_bytes_of_the_specs():
    assert KV.block_bytes(16) == PAGE
    assert PagedKVSpec(2, 8, torch.bfloat16).block_bytes(32) == PAGE
    assert STATE.slot_bytes == SLOT


def test_pages_fill_the_memory_and_page_0_is_one_of_them():
    found = plan([KV, KV], 10 * 2 * PAGE + PAGE)
    assert (found.num_blocks, found.num_slots, found.num_bytes) == (10, 0, 10 * 2 * PAGE)


def test_no_more_pages_than_could_be_used():
    assert plan([KV], 10**9, max_blocks=7).num_blocks == 8


def test_slots_come_first_one_a_sequence_and_slot_0():
    found = plan([KV, STATE, STATE], 5 * 2 * SLOT + 3 * PAGE, max_num_seqs=4)
    assert (found.num_slots, found.num_blocks) == (5, 3)
    assert found.num_bytes == 5 * 2 * SLOT + 3 * PAGE
    assert plan([KV, STATE], 5 * SLOT + 3 * PAGE - 1, max_num_seqs=4).num_blocks == 2


def test_two_pages_are_the_least():
    assert plan([KV], 2 * PAGE).num_blocks == 2
    with pytest.raises(ConfigError, match=f"{2 * PAGE - 1:,} bytes.*{PAGE:,}"):
        plan([KV], 2 * PAGE - 1)


def test_slots_that_leave_no_page_are_named_with_numbers():
    memory = 5 * SLOT + 2 * PAGE - 1
    with pytest.raises(ConfigError, match=f"{memory:,} bytes.*5 state slots take {5 * SLOT:,}.*max_num_seqs"):
        plan([KV, STATE], memory)
    with pytest.raises(ConfigError, match=f"5 state slots take {5 * SLOT:,}"):
        plan([KV, STATE], SLOT)


def test_a_fixed_number_of_pages_is_taken_beside_page_0():
    found = plan([KV], 11 * PAGE, num_blocks=10)
    assert (found.num_blocks, found.num_bytes) == (11, 11 * PAGE)
    assert plan([KV], 10**9, num_blocks=10, max_blocks=5).num_blocks == 11


def test_a_fixed_number_of_pages_that_does_not_fit_is_refused_with_numbers():
    with pytest.raises(ConfigError, match=f"num_kvcache_blocks=11 needs {12 * PAGE:,} bytes.*{11 * PAGE:,}"):
        plan([KV], 11 * PAGE, num_blocks=11)
    with pytest.raises(ConfigError, match=f"num_kvcache_blocks=1 needs {2 * PAGE:,} bytes.* 0 are free"):
        plan([KV, STATE], SLOT, num_blocks=1)


def test_models_of_state_alone_have_pages_that_cost_nothing():
    found = plan([STATE], 5 * SLOT, max_blocks=7)
    assert (found.num_slots, found.num_blocks, found.num_bytes) == (5, 8, 5 * SLOT)
    assert plan([STATE], 5 * SLOT, max_blocks=7, num_blocks=3).num_blocks == 4
    assert plan([STATE], 5 * SLOT, max_blocks=7, num_blocks=30).num_blocks == 31


@pytest.mark.parametrize("num_blocks", [None, 3])
def test_states_that_do_not_fit_are_refused_without_pages_too(num_blocks):
    """A model of state alone got a plan beyond its memory."""
    with pytest.raises(ConfigError, match=f"{5 * SLOT - 1:,} bytes.*{5 * SLOT:,}.*max_num_seqs"):
        plan([STATE], 5 * SLOT - 1, num_blocks=num_blocks)


@given(
    st.lists(st.sampled_from([KV, STATE]), min_size=1, max_size=5),
    st.integers(-100, 200_000),
    st.integers(1, 9),
    st.integers(1, 50),
    st.none() | st.integers(1, 60),
)
def test_every_plan_fits_and_is_the_largest(specs, memory, max_num_seqs, max_blocks, num_blocks):
    page = sum(PAGE for spec in specs if spec is KV)
    slots = sum(SLOT for spec in specs if spec is STATE) * (max_num_seqs + 1)
    wanted = (num_blocks or max_blocks) + 1
    try:
        found = plan(specs, memory, max_num_seqs=max_num_seqs, max_blocks=max_blocks, num_blocks=num_blocks)
    except ConfigError:
        assert slots + (2 if num_blocks is None else wanted) * page > memory
        return
    assert found.num_slots == (max_num_seqs + 1 if slots else 0)
    assert found.num_bytes == slots + found.num_blocks * page <= memory
    assert 2 <= found.num_blocks <= wanted
    assert found.num_blocks == wanted or (num_blocks is None and found.num_bytes + page > memory)
