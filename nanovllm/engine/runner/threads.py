"""How many threads compute on the CPU, and on which of its NUMA nodes."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

import psutil
import torch

from nanovllm.engine.runner.control_group import cpu_quota

logger = logging.getLogger(__name__)

_SYSTEM = Path("/sys/devices/system")


def set_threads(asked: int | None, rank: int = 0, ranks: int = 1) -> None:
    """Give torch, whose number the native kernels follow, as many threads as `asked`, or else no more than
    there is a core's time for. OMP_NUM_THREADS goes before that: torch has read it.

    Where nobody has said how many and the process may run on several NUMA nodes, it is bound to one of them:
    weights and caches are allocated where they are read, and memory of another node is read at a part of the
    speed. rank: of `ranks` on this host, which take the nodes in turn, the largest one first, and share cores.
    """
    if asked is not None:
        torch.set_num_threads(asked)
    elif "OMP_NUM_THREADS" not in os.environ:
        nodes, sharing = numa_nodes(), ranks
        if len(nodes) > 1:
            mine = rank % len(nodes)
            sharing = len(range(mine, ranks, len(nodes)))
            _bind(nodes[mine])
            logger.info("bound to %d of the CPUs, those of one NUMA node; num_threads=N runs unbound", len(nodes[mine]))
        cores = int(min(usable_cores() / sharing, cpu_quota() / ranks))
        torch.set_num_threads(min(torch.get_num_threads(), max(1, cores)))


def usable_cores() -> int:
    """Physical cores, within what this process may run on and its control group's quota. A second thread on
    a core shares the multipliers that the first one keeps busy."""
    allowed = _allowed_cpus()
    cores = min(_physical_cores(allowed), len(allowed) or math.inf, cpu_quota())
    return max(1, int(cores)) if cores < math.inf else 1


def numa_nodes() -> list[set[int]]:
    """The CPUs of each NUMA node that this process may use, the largest node first; empty where the system
    does not tell."""
    allowed = _allowed_cpus()
    lists = sorted(_SYSTEM.glob("node/node[0-9]*/cpulist"), key=lambda path: int(path.parent.name[len("node") :]))
    found = [_parse_cpus(path.read_text()) & allowed for path in lists]
    return sorted((cpus for cpus in found if cpus), key=len, reverse=True)


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 0))


def _physical_cores(cpus: set[int]) -> float:
    """Infinite where the system does not tell."""
    try:
        return len({(_SYSTEM / f"cpu/cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in cpus}) or math.inf
    except OSError:
        return psutil.cpu_count(logical=False) or math.inf


def _parse_cpus(text: str) -> set[int]:
    """The kernel's lists, such as 0-3,8-11."""
    ranges = (part.split("-") for part in text.strip().split(",") if part)
    return {cpu for ends in ranges for cpu in range(int(ends[0]), int(ends[-1]) + 1)}


def _bind(cpus: set[int]) -> None:
    """All threads of this process, those that torch has started already among them."""
    for task in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), cpus)
        except ProcessLookupError:  # it has ended meanwhile
            continue
