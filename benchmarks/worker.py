"""A process for each engine, which stands still while another one works.

python -m benchmarks.worker ENGINE     is such a process; it is asked by lines of JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.engines import ENGINES
from benchmarks.probe import Probe
from benchmarks.workload import Job, Refused

ROOT = Path(__file__).parents[1]
_LAST_WORDS = 10  # seconds to end in


class EngineEnded(Exception):
    """An engine's process is gone, and what it said at the end."""


class Worker:
    """An engine's process group; stopped while another engine runs, so that nobody's idle threads
    (some spin) take its cores."""

    def __init__(self, engine: str, python: str, job: Job) -> None:
        """EngineEnded if it does not load. seconds to load: `load`."""
        self.engine = engine
        command = [python, "-m", "benchmarks.worker", engine]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            self.load: float = self.ask(dataclasses.asdict(job))["seconds"]
        except BaseException:  # whoever asks to end us while it loads must not leave it behind
            self.close()
            raise

    def ask(self, question: object) -> dict[str, Any]:
        """Its answer to a job or to batches of sequences: at least the seconds that they took. EngineEnded if there is
        none."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        answer = ""
        with contextlib.suppress(ProcessLookupError, BrokenPipeError):
            os.killpg(process.pid, signal.SIGCONT)
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        if not answer:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LAST_WORDS)  # for a status of its own
            self.close()
            raise EngineEnded(
                f"{self.engine} ended with status {process.returncode}; is it installed for its --python?"
            )
        found = json.loads(answer)
        if "refused" in found:
            self.close()
            raise EngineEnded(found["refused"])
        os.killpg(process.pid, signal.SIGSTOP)
        return found

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def serve(name: str) -> None:
    """Load what the first line says, then run each other one's batches of sequences; answers go to the real stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    start = time.perf_counter()
    job = Job(**json.loads(sys.stdin.readline()))
    try:
        engine = Probe(job) if name == "probe" else ENGINES[name](job)
    except Refused as error:
        print(json.dumps({"refused": str(error)}), file=answers, flush=True)
        return
    print(json.dumps({"seconds": time.perf_counter() - start}), file=answers, flush=True)
    for line in sys.stdin:
        batches = json.loads(line)
        start = time.perf_counter()
        found = [engine.run(sequences) or {} for sequences in batches][-1]
        print(json.dumps({"seconds": time.perf_counter() - start, **found}), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
