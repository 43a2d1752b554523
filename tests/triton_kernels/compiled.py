"""What is asked of kernels that were compiled ahead of time."""

from __future__ import annotations

SHARED = {75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024}  # bytes that a block may have, by chip


def problem(row: dict) -> str | None:
    if row["error"]:
        return row["error"]
    if row["shared"] > SHARED[row["chip"]]:
        return f"{row['shared']} bytes of shared memory are too much"
    return f"{row['stack']} bytes of registers are spilled" if row["stack"] else None


def check(rows: list[dict]) -> None:
    """Of each variant that it compiled and fits. Prints a table: see it with -s."""
    for row in rows:
        taken = f"{row['registers']:>4} registers {row['shared']:>7} shared"
        print(f"sm_{row['chip']} {taken}  {row['kernel']}: {row['what']}")
    problems = [f"{row['kernel']} on sm_{row['chip']} ({row['what']}): {problem(row)}" for row in rows if problem(row)]
    assert rows and not problems, "\n".join(problems)
