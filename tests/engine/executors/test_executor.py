"""Executors: what all of them promise, tried on each; then faults, with real processes."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import rank_models
from helpers import run_all, wait_until
from rank_models import EXIT, HANG, KILL, OPTIONS, RAISE, STOP, sum_model

from nanovllm import LLM, ConfigError, EngineClosed, RequestError, SamplingParams, WeightError, WorkerDied
from nanovllm.cache_spec import CachePlan
from nanovllm.config import EngineConfig
from nanovllm.engine.executors import mp
from nanovllm.engine.executors.mp import MultiprocessExecutor, require_devices
from nanovllm.engine.executors.plan_wire import PlanWriter
from nanovllm.engine.executors.worker_pool import suspect
from nanovllm.engine.executors.workers import smallest
from nanovllm.engine.runner.threads import usable_cores
from nanovllm.weights.checkpoint import open_checkpoint

ROOT = Path(__file__).parents[3]
EXECUTORS = {
    "in-process": {},
    "mp, one rank": {"executor": "mp"},
    "mp, two ranks": {"tensor_parallel_size": 2},
}
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return sum_model(tmp_path_factory.mktemp("sum"))


@pytest.fixture(scope="module", params=EXECUTORS)
def llm(request, model):
    with LLM(model, **OPTIONS, **EXECUTORS[request.param]) as llm:
        yield llm


@pytest.fixture
def two_ranks(model):
    """start(**options) -> an LLM of two ranks. No process of it is left afterwards."""
    before = workers_of(os.getpid())
    with contextlib.ExitStack() as stack:

        def start(**options):
            llm = LLM(model, **OPTIONS, **{"tensor_parallel_size": 2, **options})
            stack.callback(llm.close)
            return llm

        yield start
    assert workers_of(os.getpid()) == before


def workers_of(pid):
    return [
        p
        for p in psutil.Process(pid).children(recursive=True)
        if "nanovllm.engine.executors.worker" in " ".join(p.cmdline())
    ]


def pids(llm):
    return dict(enumerate(llm.apply_model(rank_models.pid_of)))


def expected(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append((sum(tokens) * 7 + 3) % 190)
    return tokens[len(prompt) :]


def generate(llm, prompts, params=GREEDY):
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


def test_tokens_are_the_models(llm):
    prompts = [list(range(i, 3 * i)) for i in range(1, 20)]
    assert generate(llm, prompts) == [expected(prompt, 12) for prompt in prompts]


def test_messages_have_no_size_limit(llm):
    """A prompt of two chunks, a plan and a result each larger than a pipe holds."""
    prompts = [[i] * 2000 for i in range(1, 60)]
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=-1, prompt_logprobs=0)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == [expected(prompt, 3) for prompt in prompts]
    assert all(len(output.prompt_logprobs) == 2000 for output in outputs)
    assert all(len(output.outputs[0].logprobs[2]) == rank_models.VOCAB for output in outputs)


def test_every_rank_answers(llm):
    ranks = llm.engine.config.tensor_parallel_size
    assert llm.apply_model(rank_models.rank_of) == list(range(ranks))
    assert set(llm.apply_model(rank_models.state_slots)) == {llm.engine._executor.capacity.num_slots}


def test_a_function_that_raises_ends_nothing(llm):
    with pytest.raises((KeyError, RequestError), match="asked for too much"):
        llm.apply_model(rank_models.fail)
    assert generate(llm, [[1, 2]]) == [expected([1, 2], 12)]


def test_an_interrupted_step_is_not_mixed_up_with_the_next(llm, monkeypatch):
    """The future of a step that nobody waits for any more must not answer for another step."""
    real, calls = llm.engine._executor.submit, []

    def interrupted(plan):
        calls.append(real(plan))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return calls[-1]

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine._executor, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(llm, [[3, 4], [5]])
    assert generate(llm, [[3, 4], [5]]) == [expected([3, 4], 12), expected([5], 12)]


def test_random_operations_give_what_the_in_process_executor_gives(llm, model):
    random = np.random.default_rng(5)
    with LLM(model, **OPTIONS, async_scheduling=llm.engine.config.async_scheduling) as other:
        shown = {id(engine): {} for engine in (llm.engine, other.engine)}
        added = 0
        for _ in range(150):
            operation = random.choice(["add", "abort", "step", "step", "step", "sleep"])
            prompt, seed = random.integers(0, 190, random.integers(1, 30)).tolist(), int(random.integers(100))
            victim = f"random {random.integers(added + 1)}"
            for engine in (llm.engine, other.engine):
                if operation == "add":
                    params = SamplingParams(temperature=0.9, seed=seed, max_tokens=1 + seed % 20, presence_penalty=0.5)
                    engine.add(engine.prepare(prompt, params, request_id=f"random {added}"))
                elif operation == "abort":
                    engine.abort(victim)
                elif operation == "step" and engine.has_unfinished:
                    shown[id(engine)] |= {o.request_id: list(o["token_ids"]) for o in engine.step()}
                elif operation == "sleep":
                    time.sleep(0.002)
            added += operation == "add"
        for engine in (llm.engine, other.engine):
            while engine.has_unfinished:
                shown[id(engine)] |= {o.request_id: list(o["token_ids"]) for o in engine.step()}
    first, second = shown.values()
    assert len(first) > 10 and first == second


def test_closing_twice_is_harmless(model):
    for options in EXECUTORS.values():
        llm = LLM(model, **OPTIONS, **options)
        llm.close()
        llm.close()
        with pytest.raises(EngineClosed):
            generate(llm, [[1]])
    assert not [p for p in workers_of(os.getpid()) if p.status() == psutil.STATUS_ZOMBIE]


def test_two_engines_at_once(two_ranks):
    first, second = two_ranks(), two_ranks(seed=3)
    streams = [llm.engine for llm in (first, second)]
    for engine in streams:
        engine.add(engine.prepare([7, 8], GREEDY, request_id="x"))
    outputs = [run_all(engine)["x"]["token_ids"] for engine in streams]
    assert outputs == [expected([7, 8], 12)] * 2
    assert not set(pids(first).values()) & set(pids(second).values())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_fails_all_requests_within_two_seconds(two_ranks, rank):
    llm = two_ranks()
    workers = pids(llm)
    engine = llm.engine
    for i in range(32):
        engine.add(engine.prepare([i], SamplingParams(temperature=0, max_tokens=500)))
    engine.step()
    assert not any("/dev/shm" in Path(f"/proc/{pid}/maps").read_text() for pid in workers.values())
    os.kill(workers[rank], signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(WorkerDied, match=f"rank {rank} was killed by SIGKILL") as caught:
        run_all(engine)
    assert time.monotonic() - start < 2.0
    assert caught.value.rank == rank
    assert not any(psutil.pid_exists(pid) for pid in workers.values())
    assert not engine.has_unfinished
    for call in (engine.step, lambda: generate(llm, [[1]]), lambda: llm.apply_model(rank_models.rank_of)):
        with pytest.raises(WorkerDied, match=f"rank {rank}"):
            call()
    llm.close()
    with pytest.raises(EngineClosed):
        engine.step()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_killed_amid_recorded_steps(tiny_model, rank):
    """The other one waits in native code."""
    options = {"skip_tokenizer_init": True, "device": "cpu", "tensor_parallel_size": 2, "max_num_seqs": 32}
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with LLM(str(tiny_model("llama")), **options) as llm:
        workers, killed = pids(llm), []

        def kill():
            killed.append(time.monotonic())
            os.kill(workers[rank], signal.SIGKILL)

        threading.Timer(0.5, kill).start()
        with pytest.raises(WorkerDied, match=f"rank {rank} was killed by SIGKILL"):
            generate(llm, [[1 + i % 100] for i in range(6400)], params)
        assert time.monotonic() - killed[0] < 2.0
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in workers.values()))


@pytest.mark.parametrize(
    ("token", "rank", "message"),
    [
        (RAISE, 1, "rank 1 failed: ArithmeticError: a sum went wrong"),
        (EXIT, 1, "rank 1 exited with code 3"),
        (KILL, 1, "rank 1 was killed by SIGKILL"),
        pytest.param(STOP, 1, "rank 1 did not answer for 1 s", marks=pytest.mark.slow),
    ],
)
def test_what_goes_wrong_in_a_step(two_ranks, token, rank, message):
    llm = two_ranks(worker_timeout=1)
    with pytest.raises(WorkerDied, match=message) as caught:
        generate(llm, [[1, token]])
    assert caught.value.rank == rank
    if token == RAISE:
        assert "in misbehave" in str(caught.value.__cause__)


@pytest.mark.slow
def test_a_rank_that_hangs(two_ranks):
    llm = two_ranks(worker_timeout=1)
    start = time.monotonic()
    with pytest.raises(WorkerDied, match="rank 1 did not answer for 1 s") as caught:
        generate(llm, [[1, HANG]])
    assert "time.sleep(60)" in caught.value.details
    assert time.monotonic() - start < 10


def test_who_is_suspected_when_nobody_answers():
    step, collective = 'File "/x/nanovllm/models/m.py"', 'File "/x/nanovllm/distributed/shared_memory.py"'
    recorded = step + '\nFile "/x/nanovllm/ops/recorder.py"'
    assert suspect({0: (3, step + collective), 1: (3, step), 2: (3, step + collective)}) == 1
    assert suspect({0: (3, recorded), 1: (3, recorded), 2: (3, collective + step)}) == 2
    assert suspect({0: (3, step), 1: (2, step), 2: None}) == 2
    assert suspect({0: (3, step), 1: (2, step)}) == 1


def test_a_failed_load_on_one_rank_ends_all_with_its_error(tmp_path):
    model, before = sum_model(tmp_path, damaged=1), workers_of(os.getpid())
    with pytest.raises(WeightError, match="the shard is damaged") as caught:
        LLM(model, **OPTIONS, tensor_parallel_size=2)
    assert "rank 1" in str(caught.value.__cause__)
    assert not [p for p in workers_of(os.getpid()) if p not in before]


def test_ranks_agree_on_the_smallest_capacity(tmp_path):
    model = sum_model(tmp_path, wide=1)
    options = OPTIONS | {"kvcache_memory": 512, "max_num_seqs": 30, "tensor_parallel_size": 2}
    with LLM(model, **options) as llm:
        assert llm.apply_model(rank_models.state_slots) == [4, 4]  # 256 bytes a rank, 64 a wide state
        assert generate(llm, [[i] for i in range(9)]) == [expected([i], 12) for i in range(9)]


def test_smallest_plan():
    plans = [CachePlan(9, 4, 100, chunk_grid=8), CachePlan(7, 5, 90, chunk_grid=8)]
    assert smallest(plans) == CachePlan(7, 4, 90, chunk_grid=8)


def test_ranks_share_the_cores(model, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with LLM(model, **OPTIONS, tensor_parallel_size=2) as llm:
        shared = llm.apply_model(rank_models.threads)
    assert shared == [max(1, usable_cores() // 2)] * 2
    with LLM(model, **OPTIONS, tensor_parallel_size=2, num_threads=3) as llm:
        assert llm.apply_model(rank_models.threads) == [3, 3]


def test_what_workers_cannot_import(two_ranks):
    llm = two_ranks()
    with pytest.raises(RequestError, match="at the top of a module"):
        llm.apply_model(lambda model: 1)


def test_a_model_that_workers_cannot_import(model, monkeypatch):
    monkeypatch.setattr(rank_models.SumForCausalLM, "__module__", "__main__")
    config = EngineConfig(model, device="cpu", tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="use model_plugin"):
        MultiprocessExecutor(config, rank_models.SumForCausalLM, open_checkpoint(Path(model)))
    assert all(worker.status() != psutil.STATUS_ZOMBIE for worker in workers_of(os.getpid()))


def test_systems_without_nameless_files(model, monkeypatch):
    monkeypatch.setattr(mp.sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="needs Linux"):
        LLM(model, **OPTIONS, executor="mp")


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(mp.torch.cuda, "device_count", lambda: 1)
    config = EngineConfig("m", device="cuda", tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="needs 2 GPUs here, and torch sees 1"):
        require_devices(config, 2)
    require_devices(config, 1)


def test_an_interrupted_submit_writes_the_next_plan_in_full(model, monkeypatch):
    """What PlanWriter thinks that ranks know, they would not."""
    with LLM(model, **OPTIONS, executor="mp") as llm:
        executor = llm.engine._executor
        llm.engine.add(llm.engine.prepare([1, 2], GREEDY, request_id="x"))
        llm.engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(executor._pool, "ask", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                llm.engine.step()
        assert executor._writer._indices == PlanWriter()._indices
        while llm.engine.has_unfinished:
            output = llm.engine.step()
        assert output[0]["token_ids"] == expected([1, 2], 12)


LEAVE = """
import os, signal, sys, time
from nanovllm import LLM
llm = LLM({model!r}, **{options!r}, tensor_parallel_size=2)
print("ready", flush=True)
{end}
"""


@pytest.fixture
def driver(model, tmp_path, interruptible_children):
    """driver(end) -> a process that does this last and has two workers. Nothing of it is left afterwards: no call of
    close(), and the script has no `if __name__ == '__main__'` either."""
    script, folder, found = tmp_path / "script.py", tmp_path / "temporary", []
    folder.mkdir()

    def start(end):
        script.write_text(LEAVE.format(model=model, options=OPTIONS, end=end))
        env = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, str(script)], env=env, stdout=subprocess.PIPE, text=True)
        workers = []
        while process.poll() is None and len(workers) < 2:
            with contextlib.suppress(psutil.NoSuchProcess):
                workers = workers_of(process.pid)
        assert len(workers) == 2
        found.append((process, workers))
        return process

    yield start
    for process, workers in found:
        process.wait(20)
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "end",
    [
        "sys.exit(0)",
        "os.kill(os.getpid(), signal.SIGKILL)",
        pytest.param("os.kill(os.getpid(), signal.SIGTERM)", marks=pytest.mark.slow),
        pytest.param("signal.default_int_handler(2, None)", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_left_of_a_driver_that_ends(driver, end):
    assert driver(end).stdout.readline() == "ready\n"


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_nothing_is_left_of_a_driver_that_waits_for_a_step(driver, number):
    process = driver(f"llm.generate([[1, {HANG}]])")
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)
    process.send_signal(number)


def test_nothing_is_left_of_a_driver_whose_workers_still_start(driver):
    driver("").kill()
