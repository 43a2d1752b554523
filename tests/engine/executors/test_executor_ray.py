"""Ray: actors on two nodes of a cluster on this machine, who take each other for hosts, and one of our own."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path

import psutil
import pytest
import rank_models
from helpers import run_all, wait_until
from rank_models import HANG, OPTIONS, RAISE, sum_model
from tiny_models import make_tiny_model

from nanovllm import LLM, ConfigError, SamplingParams, WeightError, WorkerDied
from nanovllm.config import EngineConfig
from nanovllm.engine.executors import ray as executor_ray
from nanovllm.engine.executors import ray_cluster
from nanovllm.engine.executors.worker import Place, WorkerTask, find_files
from nanovllm.ops.library import Library, library_or_reason

ROOT = Path(__file__).parents[3]
NODE = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
LLAMA = {"device": "cpu", "skip_tokenizer_init": True, "kvcache_memory": "8MiB"}
PROMPTS = [[5, 6, 7], list(range(2, 60)), [9]]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SHARED = "SharedMemoryCommunicator" if isinstance(library_or_reason(), Library) else "GlooCommunicator"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return sum_model(tmp_path_factory.mktemp("sum"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny one, and what it says on one rank."""
    sizes = {"intermediate_size": 102, "num_key_value_heads": 6}
    path = str(make_tiny_model("tinyllama", tmp_path_factory.mktemp("llama"), **sizes))
    with LLM(path, **LLAMA) as llm:
        return path, generate(llm, PROMPTS)


@pytest.fixture(scope="module")
def address():
    """Of a cluster of two nodes, to which this process is connected."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        cluster.add_node(**NODE)
        ray.init(address=cluster.address)
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def cluster(address, monkeypatch):
    """All that was taken of it is given back."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    yield
    wait_until(lambda: free_cpus() == 4)


def free_cpus():
    import ray

    return ray.available_resources().get("CPU", 0)


def start(model, **options):
    return LLM(model, **{**OPTIONS, "executor": "ray", "num_threads": 1, **options})


def generate(llm, prompts, params=GREEDY):
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize(
    ("ranks", "threads", "nodes", "communicator"),
    [(2, 1, [2], SHARED), (2, 2, [1, 1], "GlooCommunicator"), (3, 1, [1, 2], "GlooCommunicator")],
)
def test_text_is_that_of_one_rank(cluster, llama, ranks, threads, nodes, communicator):
    """On one node, on two, and where one of the two has more ranks than the other."""
    path, expected = llama
    with LLM(path, **LLAMA, executor="ray", tensor_parallel_size=ranks, num_threads=threads) as llm:
        where = llm.apply_model(rank_models.ray_node)
        assert sorted(where.count(node) for node in set(where)) == nodes
        assert where == sorted(where, key=where.index)  # neighbours
        here = rank_models.ray_node(None)
        assert where == sorted(where, key=lambda node: (node != here, node))  # neighbours, those of this node first
        assert llm.apply_model(rank_models.communicator) == [communicator] * ranks
        assert llm.apply_model(rank_models.threads) == [threads] * ranks
        assert generate(llm, PROMPTS) == expected
        wait_until(lambda: free_cpus() == 4 - ranks * threads)


def test_ranks_share_the_cores_of_a_host_like_this_one(cluster, model, monkeypatch):
    """Whatever OMP_NUM_THREADS was when Ray was started."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(executor_ray, "usable_cores", lambda: 4)
    with start(model, tensor_parallel_size=2, num_threads=None) as llm:
        assert llm.apply_model(rank_models.threads) == [2, 2]


def test_files_that_the_drivers_host_alone_has(tmp_path):
    place, config = Place("", gpu=0, host_rank=0, host_ranks=1), EngineConfig(str(tmp_path))
    for there, found in ((ROOT, ROOT), (tmp_path / "not here", tmp_path)):
        assert find_files(WorkerTask(0, 1, place, config, None, there, 0)) == found


def test_messages_have_no_size_limit(cluster, model):
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=-1, prompt_logprobs=0)
    prompts = [[i] * 2000 for i in range(1, 20)]
    with start(model, tensor_parallel_size=2) as llm, LLM(model, **OPTIONS) as other:
        outputs, expected = (engine.generate(prompts, params, use_tqdm=False) for engine in (llm, other))
    assert [o.outputs[0].logprobs for o in outputs] == [o.outputs[0].logprobs for o in expected]


@pytest.mark.parametrize("way", ["SIGKILL", pytest.param("ray.kill", marks=pytest.mark.slow)])
def test_a_killed_actor_fails_all_requests_within_two_seconds(cluster, model, way):
    with start(model, tensor_parallel_size=3) as llm:
        engine, pids = llm.engine, llm.apply_model(rank_models.pid_of)
        for i in range(32):
            engine.add(engine.prepare([i], SamplingParams(temperature=0, max_tokens=500)))
        engine.step()
        if way == "SIGKILL":
            os.kill(pids[2], signal.SIGKILL)
        else:
            engine._executor._pool._workers[2].kill()
        begin = time.monotonic()
        with pytest.raises(WorkerDied, match="rank 2 is gone: it") as caught:
            run_all(engine)
        assert time.monotonic() - begin < 2.0
        assert caught.value.rank == 2 and ("was killed" in caught.value.cause) == (way == "ray.kill")
        assert str(pids[2]) in caught.value.details
        with pytest.raises(WorkerDied):
            generate(llm, [[1]])
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_a_rank_that_raises_sends_its_traceback(cluster, model):
    with start(model, tensor_parallel_size=2) as llm:
        with pytest.raises(WorkerDied, match="rank 1 failed: ArithmeticError: a sum went wrong") as caught:
            generate(llm, [[1, RAISE]])
        assert "in misbehave" in str(caught.value.__cause__)


def test_a_failed_load_on_one_rank_ends_all_with_its_error(cluster, tmp_path):
    with pytest.raises(WeightError, match="the shard is damaged") as caught:
        start(sum_model(tmp_path, damaged=1), tensor_parallel_size=3)
    assert "rank 1" in str(caught.value.__cause__)


def test_what_the_cluster_lacks(cluster, model, monkeypatch):
    with pytest.raises(ConfigError, match=r"5 ranks with 1 CPUs each do not fit.* 2 nodes have 2 \+ 2 CPUs"):
        start(model, tensor_parallel_size=5)
    with pytest.raises(ConfigError, match="2 ranks with 3 CPUs each do not fit"):  # as no node has three
        start(model, tensor_parallel_size=2, num_threads=3)
    with pytest.raises(ConfigError, match=r"2 \+ 2 CPUs and 1 \+ 1 GPUs: .*device='cpu'"):
        start(model, device="cuda", kvcache_memory=None, tensor_parallel_size=3)
    with start(model, tensor_parallel_size=3):
        monkeypatch.setattr(ray_cluster, "_PLACEMENT_S", 0.3)
        with pytest.raises(ConfigError, match="others use it, and 1 CPUs are free"):
            start(model, tensor_parallel_size=2)


def test_a_gpu_for_each_rank(cluster):
    """As far as Ray knows: these are but numbers."""
    placement = ray_cluster.Placement(2, cpus=1, gpus=1)
    try:
        assert len(set(placement.nodes)) == 2
        assert [placement.options(rank)["num_gpus"] for rank in range(2)] == [1, 1]
    finally:
        placement.remove()
        placement.remove()


def test_a_host_that_is_gone_is_an_end_behind_what_it_has_sent():
    ours, theirs = Pipe()
    theirs.send("last words")
    executor_ray._hang_up(ours)
    assert ours.recv() == "last words"
    with pytest.raises(EOFError):
        ours.recv()


def test_ray_is_not_installed(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install "nanovllm\[ray\]"'):
        start(model)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://head:10001", "must run on a node of the cluster"),
        ("127.0.0.1:9", "cannot connect to the Ray cluster 127.0.0.1:9: .*refused"),
        ("nonsense", "cannot connect to the Ray cluster nonsense: Invalid address"),
    ],
)
def test_addresses_that_lead_nowhere(model, monkeypatch, address, message):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=message):
        start(model)


SCRIPT = """
import json, os, signal, sys
import psutil, rank_models
from nanovllm import LLM
llm = LLM({model!r}, **{options!r}, executor="ray", tensor_parallel_size=2, num_threads=1)
found = [psutil.Process(pid) for pid in llm.apply_model(rank_models.pid_of)] + psutil.Process().children(True)
print(json.dumps([(p.pid, " ".join(p.cmdline())) for p in found]), flush=True)
{end}
"""
SIGKILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("own", "end"),
    [
        (False, SIGKILL),
        (True, "sys.exit(0)"),
        pytest.param(False, "sys.exit(0)", marks=pytest.mark.slow),
        pytest.param(True, SIGKILL, marks=pytest.mark.slow),
        pytest.param(True, "llm.close(); signal.pause()", marks=pytest.mark.slow),
        pytest.param(True, f"llm.generate([[1, {HANG}]])  # SIGINT", marks=pytest.mark.slow),
        pytest.param(False, f"llm.generate([[1, {HANG}]])  # SIGINT", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_left_when_the_driver_ends(cluster, model, tmp_path, own, end, interruptible_children):
    """own: with a cluster of our own."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(model=model, options=OPTIONS, end=end))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    env |= {"RAY_ADDRESS": "local"} if own else {}
    driver = subprocess.Popen([sys.executable, str(script)], env=env, stdout=subprocess.PIPE, text=True)
    try:
        started = dict(json.loads(driver.stdout.readline()))
        assert len(started) > 2 if own else len(started) == 2
        if end == SIGKILL:  # Ray's agents look for it for a minute
            started = {pid: command for pid, command in started.items() if "Agent" not in command}
        if "generate" in end:
            time.sleep(1)
            driver.send_signal(signal.SIGINT)
        if "pause" not in end:
            driver.wait(20)
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in started))
    finally:
        driver.kill()
        driver.wait()
