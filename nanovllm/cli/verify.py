"""`nanovllm verify`: whether logits keep their bits however a request is served, and what changes them."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from nanovllm.cli.prompts import Prompt, random_prompts, sizes_with_room, text_prompts
from nanovllm.cli.replay import Way, longest_request, serve, ways
from nanovllm.cli.row_bits import Logits, ModuleBits, first_module, recorded_logits, recorded_modules, same_bits
from nanovllm.cli.subject import subject
from nanovllm.cli.trace import Divergence
from nanovllm.config import EngineConfig
from nanovllm.llm import LLM
from nanovllm.models.base import CausalLM
from nanovllm.outputs import RequestOutput
from nanovllm.weights.checkpoint import Checkpoint

_LENGTHS = (1, 5, 16, 37, 90)


def run(args: argparse.Namespace) -> int:
    with subject(args) as model:
        path, options = model.path, model.options
        prompts = [p.token_ids for p in _prompts(model.checkpoint, args.prompt)]
        block_size = EngineConfig.from_options(str(path), options).kvcache_block_size
        options |= {
            "max_model_len": longest_request(prompts, args.max_tokens, block_size),
            "skip_tokenizer_init": True,
            "async_scheduling": False,  # rows are known by their tokens
        }
        config = EngineConfig.from_options(str(path), options)
        sizes = sizes_with_room(config, model.checkpoint)
        alone, others = ways(prompts, args.max_tokens, sizes.vocab_size, block_size)
        return _report(path, options, alone, others)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of the logits [V] of each token, as far as the reference has the token with all before it.

    different: how many have another bit; largest: difference of any logit; first: tokens of the shortest
    text whose logits differ. cached: prompt tokens from the prefix cache.
    """

    tokens: int
    different: int
    largest: float
    first: int | None
    cached: int
    preemptions: int


def _prompts(checkpoint: Checkpoint, texts: list[str] | None) -> list[Prompt]:
    """The texts, or random ids; the last begins like the one before it, for the prefix cache."""
    if texts:
        return text_prompts(checkpoint, texts)
    prompts = random_prompts(checkpoint.config["vocab_size"], _LENGTHS)
    shared = prompts[-1].token_ids[:64] + prompts[-2].token_ids
    return [*prompts, Prompt("64 of them, then others", shared)]


def _report(path: Path, options: dict[str, Any], alone: Way, others: Sequence[Way]) -> int:
    print("bits of the logits of every token, against those that each request has alone")
    print(f"{'tokens':>6} {'different':>9} {'max |diff|':>10}  served")
    with LLM(str(path), **(options | alone.options)) as llm:
        with recorded_logits() as logits:
            _serve(llm, alone)
        with _modules_of(llm) as modules:
            _serve(llm, alone)
    failed = 0
    for more, same_engine in itertools.groupby(others, key=lambda way: way.options):
        group = list(same_engine)
        with LLM(str(path), **(options | more)) as llm:
            found = [_compare(llm, way, logits) for way in group]
        wrong = [way for way, comparison in zip(group, found, strict=True) if comparison.different]
        culprits = _culprits(path, options | more, wrong, modules)
        for way, comparison in zip(group, found, strict=True):
            _print_comparison(way, comparison, culprits.get(way.label))
        failed += len(wrong)
    if failed:
        print(f"bits differ in {failed} of {len(others)} ways of serving")
        return 1
    print(f"every bit is the same in all {len(others)} ways of serving")
    return 0


def _compare(llm: LLM, way: Way, logits: Logits) -> Comparison:
    before = llm.engine.stats.preemptions
    with recorded_logits(known=logits) as seen:
        outputs = _serve(llm, way)
    pairs = [(prefix, row, logits[prefix][0]) for prefix, rows in seen.items() for row in rows]
    assert pairs, "nothing that was asked for was served"
    different = [(prefix, row, expected) for prefix, row, expected in pairs if not same_bits(row, expected)]
    return Comparison(
        tokens=len(pairs),
        different=len(different),
        largest=max((float((row - expected).abs().max()) for _, row, expected in different), default=0.0),
        first=min((length for (length, _), _, _ in different), default=None),
        cached=sum(output.num_cached_tokens for output in outputs),
        preemptions=llm.engine.stats.preemptions - before,
    )


def _culprits(
    path: Path, options: dict[str, Any], wrong: Sequence[Way], modules: ModuleBits
) -> dict[str, Divergence | None]:
    """By label: the first module that differs when each is served again, op by op."""
    if not wrong:
        return {}
    found = {}
    with LLM(str(path), **(options | {"enforce_eager": True})) as llm:
        for way in wrong:
            with _modules_of(llm, known=modules) as seen:
                _serve(llm, way)
            found[way.label] = first_module(modules, seen)
    return found


@contextmanager
def _modules_of(llm: LLM, known: ModuleBits | None = None) -> Iterator[ModuleBits]:
    (model,) = cast("list[CausalLM]", llm.apply_model(lambda model: model))
    prefixes = None if known is None else {prefix for rows in known.values() for prefix in rows}
    with recorded_modules(model, llm.engine.config.kvcache_block_size, prefixes) as modules:
        yield modules


def _serve(llm: LLM, way: Way) -> list[RequestOutput]:
    before = torch.get_num_threads()
    torch.set_num_threads(way.threads)
    llm.reset_prefix_cache()
    try:
        return serve(llm, way.arrivals)
    finally:
        torch.set_num_threads(before)


def _print_comparison(way: Way, found: Comparison, culprit: Divergence | None) -> None:
    events = [f"{found.cached} prompt tokens cached"] if found.cached else []
    events += [f"{found.preemptions} preempted"] if found.preemptions else []
    more = f" ({', '.join(events)})" if events else ""
    print(f"{found.tokens:>6} {found.different:>9} {found.largest:>10.2g}  {way.label}{more}", flush=True)
    if not found.different:
        return
    named = "no module differs when it is served again op by op"
    if culprit is not None:
        named = f"first to differ: {culprit.module}; its input {'differs too' if culprit.given else 'is the same'}"
    print(f"{'':>27}  from token {found.first} on; {named}", flush=True)
