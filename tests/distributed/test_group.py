"""Sums and gathers between processes, and who gets which part."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from distributed.ranks import CPU, Ranks
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.distributed.group import TPGroup
from nanovllm.distributed.join import join_group
from nanovllm.distributed.shared_memory import SharedMemoryCommunicator
from nanovllm.distributed.torch_group import GlooCommunicator
from nanovllm.errors import ConfigError, PeerLost
from nanovllm.ops.library import Library, library_or_reason
from nanovllm.ops.native import NativeOps

LIBRARY = library_or_reason()
needs_library = pytest.mark.skipif(not isinstance(LIBRARY, Library), reason=str(LIBRARY))
# one element, odd sizes, one slot and a little more, several slots
SHAPES = [(1, 1), (1, 576), (3, 7), (32, 577), (2, 32768), (5, 65537)]
GATHERED = [(1, 1, 2), (2, 3, 5), (7, 100, 199), (1, 70001, 140001), (33, 4001, 8002)]


def term(rank: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Large and small numbers: other orders have other sums."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(shape, generator=generator) * 10 ** torch.randint(-3, 4, shape, generator=generator)


def ordered_sum(size: int, shape: tuple[int, ...]) -> torch.Tensor:
    total = term(0, shape)
    for rank in range(1, size):
        total = total + term(rank, shape)
    return total


def sums_and_gathers(group: TPGroup, kind: str) -> str:
    assert (type(group.comm) is SharedMemoryCommunicator) == isinstance(LIBRARY, Library)
    comm = group.comm if kind == "default" else GlooCommunicator(_store(kind, group), group.rank, group.size, 30)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for shape in SHAPES:
            assert torch.equal(comm.all_reduce(term(group.rank, shape)), ordered_sum(group.size, shape)), shape
            halves = [term(rank, shape).bfloat16() for rank in range(group.size)]
            expected = ordered_sum_of(halves)
            assert torch.equal(comm.all_reduce(halves[group.rank]), expected)
        for rows, columns, width in GATHERED:
            for dtype in (torch.float32, torch.bfloat16):
                parts = [term(rank, (rows, columns)).to(dtype) for rank in range(group.size)]
                whole = torch.cat(parts, dim=1)
                found = comm.gather(parts[group.rank], width)
                assert torch.equal(found, whole[:, :width]) and found.is_contiguous()
                assert torch.equal(comm.gather(parts[group.rank]), whole)
                for root in range(group.size):
                    found = comm.gather(parts[group.rank], width, root=root)
                    assert torch.equal(found, whole[:, : width if group.rank == root else 0])
    return type(comm).__name__


def ordered_sum_of(halves: list[torch.Tensor]) -> torch.Tensor:
    total = halves[0].float()
    for part in halves[1:]:
        total = total + part.float()
    return total.bfloat16()


def _store(path: str, group: TPGroup):
    return torch.distributed.FileStore(path, group.size)


@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_in_the_order_of_the_ranks(size, tmp_path):
    names = set(Ranks(size, tmp_path, sums_and_gathers, "default").results())
    assert names == {"SharedMemoryCommunicator" if isinstance(LIBRARY, Library) else "GlooCommunicator"}


def test_gloo_sums_in_the_same_order(tmp_path):
    names = set(Ranks(2, tmp_path, sums_and_gathers, str(tmp_path / "gloo")).results())
    assert names == {"GlooCommunicator"}


def replayed(group: TPGroup) -> bool:
    """A recorded step, with sums among other calls, run again on other inputs."""
    torch.set_num_threads(2)
    ops = NativeOps(LIBRARY)
    x, weight = torch.zeros(40, 576), torch.ones(576)

    def step() -> torch.Tensor:
        y = ops.rms_norm(x, weight, 1e-6)
        for _ in range(3):
            y = group.all_reduce(y) + x
        return group.gather(y, 1000) * 0.5

    with torch.inference_mode():
        result, graph = ops.recorder().record(step)
        for seed in range(20):
            x.copy_(term(group.rank + 10 * seed, x.shape))
            expected = step()
            graph.replay()
            assert torch.equal(result, expected)
    return True


@needs_library
def test_sums_are_recorded_like_other_calls(tmp_path):
    assert Ranks(2, tmp_path, replayed).results() == [True, True]


def until_it_fails(group: TPGroup, victim_closes: bool) -> float:
    """Seconds that a rank waits for one that is gone. What they share has no name that could be left behind."""
    x = torch.ones(4)
    group.all_reduce(x)
    maps = Path("/proc/self/maps").read_text()
    assert "/memfd:nanovllm (deleted)" in maps and "/dev/shm" not in maps
    if group.rank == 1:
        if not victim_closes:
            os.kill(os.getpid(), signal.SIGKILL)
        group.comm.close()
        group.comm.close()
        return 0.0
    start = time.monotonic()
    for _ in range(2):  # and again at once
        with pytest.raises(PeerLost):
            group.all_reduce(x)
    return time.monotonic() - start


@needs_library
@pytest.mark.parametrize("victim_closes", [False, True])
def test_a_rank_that_is_gone_is_not_waited_for_for_ever(tmp_path, victim_closes):
    ranks = Ranks(3, tmp_path, until_it_fails, victim_closes, timeout_s=60 if victim_closes else 4)
    assert max(ranks.receive(rank, 50) for rank in (0, 2)) < 40
    assert len(set(ranks.exit_codes())) == (1 if victim_closes else 2)


def failed_replay(group: TPGroup) -> bool:
    ops = NativeOps(LIBRARY)
    x = torch.ones(2, 64)
    with torch.inference_mode():
        _, graph = ops.recorder().record(lambda: group.all_reduce(group.all_reduce(x) + x))
        graph.replay()
        if group.rank == 1:
            group.comm.close()
        for _ in range(2):
            with pytest.raises(PeerLost):
                graph.replay()
        assert torch.equal(ops.rms_norm(x, torch.ones(64), 0.0), x)  # what needs nobody goes on
    return True


@needs_library
def test_a_recorded_step_fails_with_the_rank_it_needs(tmp_path):
    assert Ranks(2, tmp_path, failed_replay).results() == [True, True]


def test_a_rank_that_does_not_come_is_named_in_time(tmp_path):
    start = time.monotonic()
    with pytest.raises(PeerLost, match="2 ranks did not meet"):
        join_group(0, 2, init_method=f"file://{tmp_path / 'alone'}", device=CPU, timeout_s=1)
    assert time.monotonic() - start < 30


def test_one_rank_meets_nobody():
    group = join_group(0, 1, init_method="", device=CPU, timeout_s=1)
    x = torch.ones(2, 3)
    assert group.all_reduce(x) is x and group.gather(x, 3) is x


def test_where_ranks_cannot_meet():
    with pytest.raises(ConfigError, match="nowhere://"):
        join_group(0, 2, init_method="nowhere://", device=CPU, timeout_s=1)


@given(st.integers(1, 40), st.integers(1, 12))
def test_parts_are_all_things_in_order(total, size):
    groups = [TPGroup(rank, size) for rank in range(size)]
    if total % size:
        with pytest.raises(ConfigError, match=f"heads: {total} does not divide by tensor_parallel_size={size}; sizes"):
            groups[0].part(total, "heads")
        return
    assert [i for g in groups for i in range(total)[g.part(total, "heads")]] == list(range(total))
    assert [g.part_or_copy(total, "heads") for g in groups] == [g.part(total, "heads") for g in groups]


@given(st.integers(1, 8), st.integers(2, 8), st.integers(1, 4))
def test_copies_go_to_the_ranks_whose_queries_read_them(kv_heads, copies, queries):
    """Of `queries` query heads a rank."""
    size = kv_heads * copies
    for rank in range(size):
        mine = TPGroup(rank, size).part_or_copy(kv_heads, "heads")
        readers = range(rank * queries, (rank + 1) * queries)
        assert {q // (queries * copies) for q in readers} == set(range(kv_heads)[mine])


def test_sizes_that_copies_allow_are_named():
    with pytest.raises(ConfigError, match=r"heads: 4 .*=6; sizes that can: 1, 2, 4, 8, 12, 16$"):
        TPGroup(0, 6).part_or_copy(4, "heads")
