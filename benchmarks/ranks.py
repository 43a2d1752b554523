"""What the processes of one host say to each other in a step that decodes, and how long it takes: 1 to 4 ranks of
one thread each.

    python bench.py --preset ranks
    python bench.py --preset ranks --shape qwen3-0.6b

Bytes of the plan that each rank reads (new: when all sequences are), of rank 0's answer, and of what each rank
gives to sums and gathers, the tokens of the step before among them. Numbers of ranks that the model does not divide by
are left out.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks import models
from benchmarks.report import finish
from nanovllm import LLM, ConfigError, SamplingParams
from nanovllm.distributed.shared_memory import SharedMemoryCommunicator
from nanovllm.engine.executors.worker import Answer

SIZES, BATCHES = (1, 2, 3, 4), (1, 32, 256)
PROMPT, STEPS = 64, 20  # tokens of each prompt, steps measured

_given: list[int] = []  # in a worker: bytes, of each sum or gather


def watch(model: nn.Module) -> None:
    """In a worker: note what is given from now on, where steps run op by op."""
    for name in ("all_reduce", "gather"):
        setattr(SharedMemoryCommunicator, name, _noting(getattr(SharedMemoryCommunicator, name)))


def _noting(plain: Any) -> Any:
    def noting(self: SharedMemoryCommunicator, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        _given.append(x.nbytes)
        return plain(self, x, *args, **options)

    return noting


def take(model: nn.Module) -> list[int]:
    """In a worker: what was given since it was last asked."""
    given = list(_given)
    _given.clear()
    return given


def run(args: argparse.Namespace) -> None:
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        if args.shape:
            model = models.shape(args.shape, Path(folder))
        else:
            model = models.find(args.model, args.dtype, Path(folder), export=False, random=False)
        print(f"{model.name} in {args.dtype}")
        print(f"{'ranks':>5} {'sequences':>9} {'new plan':>9} {'plan':>7} {'answer':>7} {'sums':>5} {'given':>11} "
              f"{'ms':>7}")  # fmt: skip
        for size in SIZES:
            try:
                measured = _measure(model, args.dtype, size)
            except ConfigError as error:
                print(f"{size:5} left out: {error}")
                continue
            for row in measured:
                print(f"{size:5} {row['sequences']:9} {row['new_plan']:9,} {row['plan']:7,} {row['answer']:7,} "
                      f"{row['sums']:5} {row['given']:11,} {row['ms']:7.2f}", flush=True)  # fmt: skip
            results += measured
    finish(args, model=model.name, dtype=args.dtype, results=results)


def _measure(model: models.Model, dtype: str, size: int) -> list[dict[str, Any]]:
    options: dict[str, Any] = {"dtype": dtype, "executor": "mp", "tensor_parallel_size": size, "num_threads": 1}
    options |= models.unquantized(model.paths["own"])
    options |= {"skip_tokenizer_init": True, "load_format": "dummy" if model.random else "auto"}
    options |= {"max_num_seqs": max(BATCHES), "max_num_batched_tokens": max(BATCHES) * PROMPT}
    with LLM(model.paths["own"], **options, enforce_eager=True) as llm:
        llm.apply_model(watch)
        rows = [{"ranks": size, "sequences": batch, **_bytes(llm, batch)} for batch in BATCHES]
    with LLM(model.paths["own"], **options) as llm:
        return [{**row, "ms": _milliseconds(llm, row["sequences"])} for row in rows]


def _bytes(llm: LLM, batch: int) -> dict[str, int]:
    """Of a step in which all prompts are computed, and of the next one."""
    _add(llm, batch, 2)
    new_plan, _ = _step(llm)
    llm.apply_model(take)
    plan, answer = _step(llm)
    given = llm.apply_model(take)[-1]  # rank 0 keeps its logits
    while llm.engine.has_unfinished:
        llm.engine.step()
    return {"new_plan": new_plan, "plan": plan, "answer": answer, "sums": len(given), "given": sum(given)}


def _step(llm: LLM) -> tuple[int, int]:
    """Bytes of the plan, for each rank, and of the answer. The step goes on after the engine's returns."""
    pool: Any = llm.engine._executor._pool  # type: ignore[union-attr]
    with mock.patch.object(pool, "ask", wraps=pool.ask) as ask:
        llm.engine.step()
    result = llm.engine._running[-1].result.result()
    return len(ask.call_args.args[0][0]), len(pickle.dumps(Answer(result)))


def _milliseconds(llm: LLM, batch: int) -> float:
    _add(llm, batch, STEPS + 2)
    seconds = []
    while llm.engine.has_unfinished:
        start = time.perf_counter()
        llm.engine.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:]) * 1e3  # all prompts in the first, a recording in the second


def _add(llm: LLM, batch: int, max_tokens: int) -> None:
    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens)
    for i in range(batch):
        llm.engine.add(llm.engine.prepare([*divmod(i, 16), *range(2, PROMPT)], params))
