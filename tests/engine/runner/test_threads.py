"""The number of threads: asked for, by the environment, or what the machine gives this process."""

import os

import pytest
import torch

from nanovllm.engine.runner import control_group
from nanovllm.engine.runner import threads as module
from nanovllm.engine.runner.threads import numa_nodes, set_threads, usable_cores


@pytest.fixture
def group(tmp_path, monkeypatch):
    monkeypatch.setattr(control_group, "_ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine({node: its CPUs}, threads_a_core): what the system says then. Returns what threads were bound to."""
    bound = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: bound.append(cpus), raising=False)

    def describe(nodes, threads_a_core=1):
        for node, cpus in nodes.items():
            (tmp_path / "node" / node).mkdir(parents=True)
            (tmp_path / "node" / node / "cpulist").write_text(cpus + "\n")
        for cpu in range(16):
            topology = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
            topology.mkdir(parents=True)
            (topology / "thread_siblings_list").write_text(f"{cpu % (16 // threads_a_core)}")
        monkeypatch.setattr(module, "_SYSTEM", tmp_path)
        # as the kernel does once a process is bound
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: bound[-1] if bound else set(range(14)), raising=False)
        return bound

    return describe


@pytest.fixture
def undecided(monkeypatch, threads):
    """Nobody has said how many threads, and torch would take more than there are cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads(16)


@pytest.mark.parametrize(("threads_a_core", "cores"), [(1, 14), (2, 8), (4, 4)])
def test_physical_cores_that_the_process_may_use(group, machine, threads_a_core, cores):
    machine({"node0": "0-15"}, threads_a_core)
    assert usable_cores() == cores


def test_a_system_that_does_not_tell(group, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SYSTEM", tmp_path / "none")
    monkeypatch.setattr(module.psutil, "cpu_count", lambda logical: 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert usable_cores() == 3
    assert numa_nodes() == []


@pytest.mark.parametrize(("text", "cores"), [("max 100000", 14), ("250000 100000", 3), ("50000 100000", 1), ("?", 14)])
def test_quota(group, machine, text, cores):
    machine({})
    (group / "cpu.max").write_text(text)
    assert usable_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [(-1, 14), (200000, 2)])
def test_quota_of_the_first_version(group, machine, quota, cores):
    machine({})
    (group / "cpu").mkdir(exist_ok=True)
    (group / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (group / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores() == cores


def test_who_decides(group, machine, undecided, monkeypatch):
    machine({"node0": "0-15"})
    set_threads(None)
    assert torch.get_num_threads() == 14
    set_threads(2)
    assert torch.get_num_threads() == 2
    set_threads(None)  # fewer than there could be are somebody's choice
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("ranks", "each"), [(1, 14), (2, 7), (3, 4), (20, 1)])
def test_ranks_share_the_cores(group, machine, undecided, ranks, each):
    machine({"node0": "0-15"})
    set_threads(None, ranks - 1, ranks)
    assert torch.get_num_threads() == each


@pytest.mark.parametrize(
    ("rank", "ranks", "quota", "node", "count"),
    [(0, 2, "max", "2-9", 8), (1, 2, "max", "10-13", 4), (0, 3, "max", "2-9", 4), (2, 3, "max", "2-9", 4),
     (1, 3, "max", "10-13", 4), (1, 2, "600000", "10-13", 3)],
)  # fmt: skip
def test_ranks_take_nodes_in_turn(group, machine, undecided, rank, ranks, quota, node, count):
    bound = machine({"node0": "2-9", "node1": "10-15"})
    (group / "cpu.max").write_text(f"{quota} 100000")
    set_threads(None, rank, ranks)
    assert bound[-1] == module._parse_cpus(node)
    assert torch.get_num_threads() == count


def test_stays_on_the_largest_node(group, machine, undecided):
    """Node 1 has six CPUs of which this process may use all, node 0 four, and node 2 is memory alone."""
    bound = machine({"node0": "0-1,8-9", "node1": "2-7", "node2": "", "node10": "10-15"}, threads_a_core=2)
    assert numa_nodes() == [{2, 3, 4, 5, 6, 7}, {0, 1, 8, 9}, {10, 11, 12, 13}]
    set_threads(None)
    assert bound[-1] == {2, 3, 4, 5, 6, 7}
    assert len(bound) == len(os.listdir("/proc/self/task"))
    assert torch.get_num_threads() == 6


@pytest.mark.parametrize("nodes", [{}, {"node0": "0-15"}, {"node0": "0-13", "node1": "14-15"}])
def test_nothing_is_bound_on_one_node(group, machine, undecided, nodes):
    bound = machine(nodes)
    set_threads(None)
    assert not bound


def test_whoever_says_how_many_is_not_bound(group, machine, undecided, monkeypatch):
    bound = machine({"node0": "0-7", "node1": "8-15"})
    set_threads(12)
    assert torch.get_num_threads() == 12
    monkeypatch.setenv("OMP_NUM_THREADS", "12")
    set_threads(None)
    assert torch.get_num_threads() == 12
    assert not bound
