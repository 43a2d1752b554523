"""How the command line writes numbers."""

from __future__ import annotations


def size_text(num_bytes: int) -> str:
    """Such as "98.0 MiB", in the largest unit of which there is one."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} B"
