"""How many threads compute on the CPU."""

from __future__ import annotations

import math
import os

import psutil
import torch

from nanovllm.engine.control_group import cpu_quota


def set_threads(asked: int | None, ranks: int = 1) -> None:
    """Give torch, whose number the native kernels follow, as many threads as `asked`, or else no more than
    there is a core's time for, which so many ranks on this host share. OMP_NUM_THREADS goes before that:
    torch has read it."""
    if asked is not None:
        torch.set_num_threads(asked)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), max(1, usable_cores() // ranks)))


def usable_cores() -> int:
    """Physical cores, within what this process may run on and its control group's quota. A second thread on
    a core shares the multipliers that the first one keeps busy."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = min(psutil.cpu_count(logical=False) or math.inf, allowed or math.inf, cpu_quota())
    return max(1, int(cores)) if cores < math.inf else 1
