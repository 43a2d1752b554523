"""`nanovllm run-batch --ray`, on a cluster of two nodes with one CPU each."""

from __future__ import annotations

import contextlib
import json
import pickle
import threading
import time
from pathlib import Path

import psutil
import pytest
from batches import contents, mixed, read, request, write

from nanovllm.cli import batch_ray
from nanovllm.cli.batch_engine import Server
from nanovllm.cli.main import main

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    ray.init(cluster.address, log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def run(cluster, chat_model, tmp_path):
    """run(out, *options): the exit status; the input is tmp_path / "in"."""

    def run_batch(out: str, *options: str) -> int:
        return main(["run-batch", str(tmp_path / "in"), str(tmp_path / out), "-m", str(chat_model), *options])

    return run_batch


def processes(word: str) -> list[psutil.Process]:
    """Of this cluster, with a word in their command lines."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found


class Assassin(threading.Thread):
    """Kills a process with `word` in its command line, once the file has some lines."""

    def __init__(self, partial: Path, lines: int, word: str) -> None:
        super().__init__(daemon=True)
        self.partial, self.lines, self.word = partial, lines, word
        self.seen = 0
        self.start()

    def run(self) -> None:
        while not (self.partial.exists() and self.partial.read_bytes().count(b"\n") >= self.lines):
            time.sleep(0.01)
        processes(self.word)[0].kill()
        self.seen = self.partial.read_bytes().count(b"\n")


def test_a_replica_that_is_killed_changes_nothing(run, tmp_path):
    write(tmp_path / "in", *mixed(40, tokens=200), "no JSON", request("r0", "again"), request("typo", "x", tmp=1))
    assert run("here") == 0
    assassin = Assassin(tmp_path / "out.partial", 8, "MapWorker(MapBatches(Replica))")
    assert run("out", "--ray", "--max-num-seqs", "2") == 0
    assert 8 <= assassin.seen < 40
    assert contents(tmp_path / "out") == contents(tmp_path / "here")


@pytest.mark.slow
def test_a_rank_of_a_replica_that_is_killed_changes_nothing(run, tmp_path):
    write(tmp_path / "in", *mixed(16, tokens=150))
    ranks = ("--tensor-parallel-size", "2")
    assert run("here", *ranks) == 0
    assassin = Assassin(tmp_path / "out.partial", 4, "nanovllm.engine.executors.worker")
    assert run("out", "--ray", "--replicas", "1", "--max-num-seqs", "2", *ranks) == 0
    assert 4 <= assassin.seen < 16
    assert contents(tmp_path / "out") == contents(tmp_path / "here")
    assert processes("nanovllm.engine.executors.worker") == []


def test_a_job_that_was_interrupted_goes_on(run, tmp_path):
    write(tmp_path / "in", *mixed(10))
    assert run("here") == 0
    whole = (tmp_path / "here").read_bytes()
    (tmp_path / "out.partial").write_bytes(whole[: len(whole) // 2])
    kept = whole[: len(whole) // 2].count(b"\n")
    assert run("out", "--ray") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "here")
    same = [
        one["id"] == other["id"] for one, other in zip(read(tmp_path / "out"), read(tmp_path / "here"), strict=True)
    ]
    assert same == [True] * kept + [False] * (10 - kept)


def test_what_fails_on_a_replica_is_the_users_error(run, tmp_path, capsys):
    write(tmp_path / "in", *mixed(3))
    assert run("out", "--ray", "--max-model-len", "10000") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("nanovllm: error: max_model_len=10000 exceeds the 512 positions")


def test_every_call_of_a_replica_whose_engine_fails_learns_of_it(monkeypatch, chat_model, threads):
    """Those that wait, and those that come later."""
    pyarrow = pytest.importorskip("pyarrow")

    def fail(engine):
        raise ZeroDivisionError("no step")

    monkeypatch.setattr(batch_ray.BatchEngine, "step", fail)
    replica = batch_ray.Replica(Server(str(chat_model), {}, ["m"]), batch_ray.Crew(1, 1, 0, 1))
    chunk = pyarrow.table({"place": [0, 1], "line": [json.dumps(line).encode() for line in mixed(2)]})
    for _ in range(2):
        (row,) = replica(chunk).to_pylist()
        with pytest.raises(RuntimeError, match=r"a replica failed:\n(?s:.*)ZeroDivisionError: no step"):
            raise pickle.loads(row["line"])
