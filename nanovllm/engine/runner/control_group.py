"""What this process's control group allows it, as seen from inside a container."""

from __future__ import annotations

import math
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def memory_left() -> float:
    """Bytes below the limit; infinite without one."""
    try:
        limit = (_ROOT / "memory.max").read_text().strip()
        used = int((_ROOT / "memory.current").read_text())
        return math.inf if limit == "max" else max(0, int(limit) - used)
    except (OSError, ValueError):
        return math.inf


def cpu_quota() -> float:
    """Cores' worth of time (version 2, then version 1); infinite without a quota."""
    try:
        quota, period = (_ROOT / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((_ROOT / "cpu" / f"cpu.cfs_{n}_us").read_text() for n in ("quota", "period"))
        except OSError:
            return math.inf
    try:
        return math.ceil(int(quota) / int(period)) if int(quota) > 0 else math.inf
    except (ValueError, ZeroDivisionError):  # "max"
        return math.inf
