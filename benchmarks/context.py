"""A decoding step behind long contexts, against reading weights, keys and values once.

python bench.py --preset context
python bench.py --preset context --num-seqs 32 --max-input 1024 --ab kv_cache_dtype=int8
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks.compare import contenders
from benchmarks.models import find, unquantized
from benchmarks.probe import Probe, probe_text
from benchmarks.report import finish
from benchmarks.roof import Work, linear_bytes
from nanovllm import LLM, SamplingParams

FEW, MANY = 4, 68  # tokens


def run(args: argparse.Namespace) -> None:
    probe, context, count = Probe(), args.max_input or 8000, args.num_seqs or 1
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        model = find(args.model, args.dtype, Path(scratch), export=False, random=False)
    options = {"dtype": args.dtype, "max_model_len": context + MANY, **unquantized(model.paths["own"])}
    asked = contenders(["nanovllm"], args.ab)
    works = {c.label: Work.of(model.config, args.dtype, c.options.get("kv_cache_dtype", "auto")) for c in asked}
    if None in works.values():
        raise SystemExit(f"{args.model}: what a step of a mixture of experts reads depends on its tokens")
    with ExitStack() as stack:
        llms = {c.label: stack.enter_context(LLM(args.model, **(options | c.options))) for c in asked}
        works = {label: replace(work, weights=linear_bytes(llms[label])) for label, work in works.items()}
        rng, vocab = random.Random(args.seed), llms["nanovllm"].get_tokenizer().vocab_size
        prompts = [[rng.randrange(vocab) for _ in range(context)] for _ in range(count)]
        for llm in llms.values():
            _seconds(llm, prompts, FEW)  # from here on their pages are cached
        steps: dict[str, list[float]] = {label: [] for label in llms}
        floors: dict[str, list[float]] = {label: [] for label in llms}
        for number in range(args.rounds):
            machine = probe.run()
            print(f"round {number + 1}: {probe_text(machine)}", flush=True)
            for label, llm in llms.items():
                few, many = (_seconds(llm, prompts, tokens) for tokens in (FEW, MANY))
                least = [works[label].seconds([(p, n) for p in prompts], 0, machine) for n in (FEW, MANY)]
                steps[label].append((many - few) * 1e3 / (MANY - FEW))
                floors[label].append((least[1] - least[0]) * 1e3 / (MANY - FEW))
                print(f"  {label}: {steps[label][-1]:.2f} ms, the floor is {floors[label][-1]:.2f}", flush=True)
    print(f"a step of {count} behind {context} tokens each:")
    for label, found in steps.items():
        share = statistics.median(floor / step for floor, step in zip(floors[label], found, strict=True))
        print(f"  {label}: {statistics.median(found):.2f} ms, {share:.0%} of the floor's pace")
    sizes = {"num_seqs": count, "context": context}
    finish(args, model=args.model, dtype=args.dtype, seed=args.seed, **sizes, milliseconds=steps, floor=floors)


def _seconds(llm: LLM, prompts: list[list[int]], count: int) -> float:
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=count)
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start
