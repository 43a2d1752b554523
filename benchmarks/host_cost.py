"""What a decoding step costs beside the model: the real engine around a model that computes nothing.

    python bench.py --preset host_cost

The model gives the same logits at every step, over 512 tokens, so that what is left is the host's work:
to schedule, build the batch, draw, book, detokenise. The last rows have 10,000 requests in the queue, or caches without
anything of the last step, as a model leaves them that has read its weights.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import tokenizers
import torch
from torch import nn

from benchmarks.report import finish
from nanovllm import SamplingParams
from nanovllm.batch import Batch
from nanovllm.build_context import BuildContext
from nanovllm.cache_spec import PagedKVSpec
from nanovllm.config import EngineConfig
from nanovllm.engine.build import fit_model_len
from nanovllm.engine.executors.base import InProcessExecutor
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.runner import model_runner
from nanovllm.engine.runner.step_batch import StepBatch
from nanovllm.engine.runner.step_graphs import StepGraphs
from nanovllm.layers.attention import CachedLayer
from nanovllm.models.base import CausalLM
from nanovllm.tokenizer.tokenizer import Tokenizer

VOCAB = 512
BATCHES = (1, 32, 256, 1024, 4096)
WAITING = 10_000
EVICTING = 1 << 25  # floats: more than caches hold
STEPS, PROMPT = 200, 512  # steps measured, tokens of each prompt
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "random": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.1, "presence_penalty": 0.5},
}
PARTS = ("schedule", "build batch", "sample", "update", "outputs")


@dataclass(frozen=True)
class Sizes:
    vocab_size: int = VOCAB
    max_position_embeddings: int = 1 << 15

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Sizes:
        return cls()


class Pages(CachedLayer):
    """Keys and values that nobody writes."""

    def __init__(self) -> None:
        super().__init__()
        self.cache_spec = PagedKVSpec(1, 2, torch.float32)

    def bind(self, *caches: torch.Tensor) -> None:
        pass


class Idle(CausalLM):
    config_class = Sizes
    weight_rules = ()

    def __init__(self, config: Any, ctx: BuildContext) -> None:
        nn.Module.__init__(self)
        self.pages = Pages()
        self.hidden = torch.zeros(1 << 16, 1)
        self.logits = torch.randn(max(BATCHES), VOCAB, generator=torch.Generator().manual_seed(0))

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.hidden[: len(batch.input_ids)]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(hidden)]


class Clock:
    """Seconds that each call of each part took."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name].append(time.perf_counter() - start)

        return timed


def make_engine(max_num_seqs: int) -> LLMEngine:
    options = {"load_format": "dummy", "device": "cpu", "max_num_seqs": max_num_seqs}
    options |= {"max_num_batched_tokens": 1 << 16, "kvcache_memory": "256MiB"}
    config = EngineConfig.from_options("idle", options)
    config = config.resolve(checkpoint_dtype="float32", max_positions=1 << 15, cuda=False)
    executor = InProcessExecutor(config, Idle, Sizes(), None)  # type: ignore[arg-type] # nothing is loaded
    config = fit_model_len(config, executor.capacity, None)
    return LLMEngine(config, _tokenizer(), executor, vocab_size=VOCAB, eos_ids=[0])


def measure(batch: int, kind: str, waiting: int = 0, *, cold: bool = False) -> dict[str, float]:
    """Microseconds a decoding step, of each part and in all; medians. cold: caches."""
    clock, weights = Clock(), torch.ones(EVICTING)
    with (
        mock.patch.object(StepBatch, "write_step", clock.wrap("build batch", StepBatch.write_step)),
        mock.patch.object(model_runner, "sample", clock.wrap("sample", model_runner.sample)),
        mock.patch.object(StepGraphs, "tokens", clock.wrap("build and sample", StepGraphs.tokens)),
    ):
        engine = make_engine(batch)
        engine.scheduler.schedule = clock.wrap("schedule", engine.scheduler.schedule)  # type: ignore[method-assign]
        engine.scheduler.update = clock.wrap("update", engine.scheduler.update)  # type: ignore[method-assign]
        engine._outputs.process = clock.wrap("outputs", engine._outputs.process)  # type: ignore[method-assign]
        params = SamplingParams(max_tokens=STEPS + 20, ignore_eos=True, **KINDS[kind])
        for i in range(batch + waiting):
            engine.add(engine.prepare([1 + i % (VOCAB - 1)] * PROMPT, params))
        for _ in range(10):
            engine.step()
        clock.seconds.clear()
        step = clock.wrap("all", engine.step)
        for _ in range(STEPS):
            if cold:
                weights.sum()
            step()
    assert len(engine.scheduler.running) == batch and engine.scheduler.num_waiting == waiting
    found = {part: statistics.median(seconds) * 1e6 for part, seconds in clock.seconds.items()}
    if "build and sample" in found:
        found["sample"] = found.pop("build and sample") - found["build batch"]
    return {**found, "the rest": found["all"] - sum(found[part] for part in PARTS)}


def _tokenizer() -> Tokenizer:
    """Two bytes a token, or one."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*letters, *(a + b for a in letters for b in letters)][:VOCAB])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend)


def run(args: argparse.Namespace) -> None:
    columns = (*PARTS, "the rest", "all")
    print(f"{'microseconds a step':<30}" + " ".join(f"{name:>11}" for name in columns))
    results: dict[str, dict[str, float]] = {}
    cases: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in KINDS}
    cases[f"greedy, {WAITING:,} waiting"] = {"kind": "greedy", "waiting": WAITING}
    cases["greedy, cold caches"] = {"kind": "greedy", "cold": True}
    for name, case in cases.items():
        for batch in BATCHES:
            found = results[f"{batch} {name}"] = measure(batch, **case)
            print(f"{f'{batch} {name}':<30}" + " ".join(f"{found[part]:11.0f}" for part in columns), flush=True)
    finish(args, microseconds={label: round(found["all"], 1) for label, found in results.items()})


if __name__ == "__main__":
    run(argparse.Namespace(json=None, plot=None))
