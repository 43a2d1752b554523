"""A process where kernels are compiled: the tests' own interprets them."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
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
        def ask(module: str, chip: int, **more: int) -> list[dict]:
            request = {"module": f"nanovllm.triton_kernels.{module}", "chip": chip, **more}
            print(json.dumps(request), file=process.stdin, flush=True)
            reply = json.loads(process.stdout.readline())
            assert "compiled" in reply, reply["error"]
            return reply["compiled"]

        yield ask
        process.stdin.close()
