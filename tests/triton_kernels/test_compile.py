"""Every variant of every Triton kernel compiles for its chips, ahead of time, and fits: no GPU is needed."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nanovllm.triton_kernels
from nanovllm.triton_kernels.variant import AMPERE_ON

pytest.importorskip("triton")

FOLDER = Path(nanovllm.triton_kernels.__path__[0])
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if "def variants()" in path.read_text())
SHARED = {75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024}  # bytes that a block may have


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory):
    """ask(module, chip) -> what the variants take; of a process where kernels are compiled, not interpreted."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR") or str(tmp_path_factory.mktemp("triton"))
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("compile_worker.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    ) as process:
        assert process.stdin and process.stdout

        @functools.cache
        def ask(module: str, chip: int) -> list[dict]:
            request = {"module": f"nanovllm.triton_kernels.{module}", "chip": chip}
            print(json.dumps(request), file=process.stdin, flush=True)
            reply = json.loads(process.stdout.readline())
            assert "compiled" in reply, reply["error"]
            return reply["compiled"]

        yield ask
        process.stdin.close()


def problem(row: dict) -> str | None:
    if row["error"]:
        return row["error"]
    if row["shared"] > SHARED[row["chip"]]:
        return f"{row['shared']} bytes of shared memory are too much"
    return f"{row['stack']} bytes of registers are spilled" if row["stack"] else None


@pytest.mark.parametrize("chip", SHARED)
@pytest.mark.parametrize("module", MODULES)
def test_every_variant_compiles(worker, module, chip):
    """Prints a table: see it with -s."""
    rows = worker(module, chip)
    for row in rows:
        taken = f"{row['registers']:>4} registers {row['shared']:>7} shared"
        print(f"sm_{row['chip']} {taken}  {row['kernel']}: {row['what']}")
    problems = [f"{row['kernel']} on sm_{row['chip']} ({row['what']}): {problem(row)}" for row in rows if problem(row)]
    assert not problems, "\n".join(problems)
    assert rows or chip == 75, "no variant"  # attention is for Ampere on


@pytest.mark.parametrize("chip", AMPERE_ON)
@pytest.mark.parametrize("module", ["prompt_attention", "decode_attention"])
def test_attention_fetches_keys_ahead(worker, module, chip):
    """When a tile's keys waited for its page numbers in the same turn of the loop, none were fetched ahead."""
    usual = worker(module, chip)[:2]
    assert usual and all(row["ahead"] >= 2 for row in usual)
