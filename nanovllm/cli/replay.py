"""The ways in which `nanovllm verify` serves the same requests: company, orders, chunks, pages, forks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

_WHEN_IDLE = 10**9
_FORKS = 3
_LARGE_PAGE = 64
_GROWTH = 3  # pages of output, more than a running sequence finds spare


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that comes before the given step, or when the engine has nothing left to do."""

    token_ids: list[int]
    params: SamplingParams
    step: int = 0


@dataclass(frozen=True, slots=True)
class Way:
    """options: of the engine, beside those of the user."""

    label: str
    arrivals: Sequence[Arrival]
    options: dict[str, Any] = field(default_factory=dict)
    threads: int = 1


def ways(prompts: Sequence[list[int]], max_tokens: int, vocab_size: int, block_size: int) -> tuple[Way, list[Way]]:
    """How the requests are served for the reference, and how else. Neighbours with equal options can share
    an engine."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    plain = [Arrival(p, params) for p in prompts]
    longest = max(prompts, key=len)
    forks = replace(params, temperature=1.0, seed=11)
    forked = [Arrival(longest, replace(forks, seed=11 + i)) for i in range(_FORKS)]
    growing = replace(params, max_tokens=_GROWTH * block_size)
    first, *later = [Arrival(p, growing) for p in _random_prompts((len(longest), 4, 5), vocab_size)]
    alone = [*plain, *forked, *later]
    others = _others(24, len(longest), max_tokens, vocab_size)
    uncached = {"enable_prefix_caching": False}

    def chunked(budget: int) -> Way:
        label = f"prompts in chunks of {budget} tokens at most"
        return Way(label, plain, {"max_num_batched_tokens": budget, "max_num_seqs": min(budget, 8), **uncached})

    # those that came later give up their pages as the first one grows
    room = -(-longest_request(prompts, max_tokens, block_size) // block_size) + 2
    scarce = {"num_kvcache_blocks": room, "kvcache_memory": None}
    pages = {"kvcache_block_size": _LARGE_PAGE if block_size != _LARGE_PAGE else 32}
    single = {"max_num_seqs": 1, **uncached}
    return Way("alone", alone, {**single, "enforce_eager": True}), [
        Way("alone, enforce_eager=False", alone, {**single, "enforce_eager": False}),
        Way("all together, enforce_eager=True", plain, {**uncached, "enforce_eager": True}),
        Way("all together", plain, uncached),
        *(
            Way(f"all together, and {n} more", [*others[: n // 2], *plain, *others[n // 2 : n]], uncached)
            for n in (1, 6, len(others))
        ),
        Way("in the opposite order", plain[::-1], uncached),
        Way("one every second step", [replace(a, step=2 * i) for i, a in enumerate(plain)], uncached),
        Way("2 threads", [*others[:2], *plain], uncached, threads=2),
        Way(f"n={_FORKS} completions", [Arrival(longest, replace(forks, n=_FORKS)), *plain], uncached),
        Way("with prefix caching, twice", [*plain, *(replace(a, step=_WHEN_IDLE) for a in plain)]),
        *(chunked(budget) for budget in (5, 16, 64)),
        Way("with too few pages", [first, *later, *plain], {**scarce, **uncached}),
        Way("with too few pages and prefix caching", [first, *later, *plain], scarce),
        Way(f"pages of {pages['kvcache_block_size']} tokens", plain, pages),
    ]


def longest_request(prompts: Sequence[list[int]], max_tokens: int, block_size: int) -> int:
    """max_model_len that every way needs."""
    return max(map(len, prompts)) + max(max_tokens, _GROWTH * block_size) + 1


def serve(llm: LLM, arrivals: Sequence[Arrival]) -> list[RequestOutput]:
    """Run to the end; the finished outputs."""
    engine, step, outputs = llm.engine, 0, []
    waiting = sorted(arrivals, key=lambda a: a.step)
    while waiting or engine.has_unfinished:
        if not engine.has_unfinished:
            step = max(step, waiting[0].step)
        while waiting and waiting[0].step <= step:
            arrival = waiting.pop(0)
            engine.add(engine.prepare(arrival.token_ids, arrival.params))
        outputs += [output for output in engine.step() if output.finished]
        step += 1
    return outputs


def _others(count: int, longest: int, max_tokens: int, vocab_size: int) -> list[Arrival]:
    """Sampled requests of many lengths, which come to their ends at different times."""
    random = np.random.default_rng(7)
    prompts = _random_prompts(random.integers(1, longest + 1, count).tolist(), vocab_size)
    lengths = random.integers(1, max_tokens + 1, count).tolist()
    return [
        Arrival(prompt, SamplingParams(max_tokens=length, seed=i, ignore_eos=True, detokenize=False))
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def _random_prompts(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    random = np.random.default_rng(7)
    return [random.integers(0, vocab_size, n).tolist() for n in lengths]
