"""Ranks as processes of their own, and what they run."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import run_all

from nanovllm import SamplingParams
from nanovllm.build_context import BuildContext
from nanovllm.config import EngineConfig
from nanovllm.distributed.group import TPGroup
from nanovllm.distributed.join import join_group
from nanovllm.engine import model_runner
from nanovllm.engine.batch_builder import build_batch
from nanovllm.engine.build import find_model
from nanovllm.engine.executor import InProcessExecutor
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.step import PlannedSequence, StepPlan
from nanovllm.weights.checkpoint import open_checkpoint

SPAWN = multiprocessing.get_context("spawn")
CPU = torch.device("cpu")


class Ranks:
    """`size` processes that run function(group, *args) and send what it returns."""

    def __init__(self, size: int, tmp_path: Path, function: Callable, *args: Any, timeout_s: float = 60) -> None:
        self._pipes, self.processes = [], []
        init_method = f"file://{tmp_path / 'meet'}"
        for rank in range(size):
            ours, theirs = SPAWN.Pipe()
            target = (rank, size, init_method, timeout_s, theirs, function, args)
            process = SPAWN.Process(target=_run, args=target, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def receive(self, rank: int, within_s: float = 300) -> Any:
        """What the rank sent; whatever it raised is raised here."""
        assert self._pipes[rank].poll(within_s), "nothing came"
        result = self._pipes[rank].recv()
        if isinstance(result, _Failure):
            raise AssertionError(f"rank {rank}: {result.text}")
        return result

    def results(self) -> list[Any]:
        found = [self.receive(rank) for rank in range(len(self._pipes))]
        for process in self.processes:
            process.join(30)
            assert process.exitcode == 0
        return found


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _run(rank: int, size: int, init_method: str, timeout_s: float, pipe: Any, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        group = join_group(rank, size, init_method=init_method, device=CPU, timeout_s=timeout_s)
        pipe.send(function(group, *args))
    except BaseException:
        pipe.send(_Failure(traceback.format_exc()))


def engine_of_rank(group: TPGroup, path: str, **options: Any) -> LLMEngine:
    """The engine that every rank runs by itself: same requests, same plans."""
    checkpoint = open_checkpoint(Path(path))
    asked = EngineConfig.from_options(path, {"skip_tokenizer_init": True, "device": "cpu", **options})
    family, sizes = find_model(asked, checkpoint)
    config = asked.resolve(checkpoint_dtype=checkpoint.dtype, max_positions=sizes.max_position_embeddings, cuda=False)
    model_runner.BuildContext = lambda *args, **options: replace(BuildContext(*args, **options), tp=group)
    executor = InProcessExecutor(config, family, sizes, checkpoint)
    return LLMEngine(config, None, executor, vocab_size=sizes.vocab_size, eos_ids=[])


def greedy(engine: LLMEngine, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    requests = [engine.prepare(prompt, params) for prompt in prompts]
    for request in requests:
        engine.add(request)
    outputs = run_all(engine)
    return [outputs[request.request_id]["token_ids"] for request in requests]


@torch.inference_mode()
def all_logits(engine: LLMEngine, token_ids: list[int]) -> np.ndarray:
    """[T, V] of one prompt in one pass."""
    runner = engine._executor._runner
    size = runner._block_size
    table = np.arange(1, 1 + -(-len(token_ids) // size))
    plan = StepPlan([PlannedSequence(0, np.array(token_ids, np.int32), 0, table, 1, None)])
    batch = build_batch(
        plan,
        block_size=size,
        device=CPU,
        backend=runner._backend,
        with_states=runner.cache_plan.num_slots > 0,
    )
    return runner.model.compute_logits(runner.model(batch)).numpy()
