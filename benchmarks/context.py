"""A decoding step behind 8,000 tokens of context, against reading weights, keys and values once.

python bench.py --preset context
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.models import find, unquantized
from benchmarks.probe import Probe, probe_text
from benchmarks.report import finish
from benchmarks.roof import Work
from nanovllm import LLM, SamplingParams

CONTEXT, FEW, MANY = 8000, 4, 68  # tokens


def run(args: argparse.Namespace) -> None:
    probe = Probe()
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        model = find(args.model, args.dtype, Path(scratch), export=False, random=False)
    work = Work.of(model.config, args.dtype)
    if work is None:
        raise SystemExit(f"{args.model}: what a step of a mixture of experts reads depends on its tokens")
    options = unquantized(model.paths["own"])
    with LLM(args.model, dtype=args.dtype, max_model_len=CONTEXT + MANY, **options) as llm:
        rng = random.Random(args.seed)
        prompt = [rng.randrange(llm.get_tokenizer().vocab_size) for _ in range(CONTEXT)]
        _seconds(llm, prompt, FEW)  # from here on its pages are cached
        steps, floors = [], []
        for number in range(args.rounds):
            machine = probe.run()
            few, many = (_seconds(llm, prompt, count) for count in (FEW, MANY))
            least_few, least_many = (work.seconds([(prompt, count)], 0, machine) for count in (FEW, MANY))
            step, floor = ((b - a) * 1e3 / (MANY - FEW) for a, b in ((few, many), (least_few, least_many)))
            print(f"round {number + 1}: {probe_text(machine)}: {step:.2f} ms, the floor is {floor:.2f}", flush=True)
            steps.append(step)
            floors.append(floor)
    share = statistics.median(floor / step for floor, step in zip(floors, steps, strict=True))
    print(f"{CONTEXT} tokens of context: {statistics.median(steps):.2f} ms a token, {share:.0%} of the floor's pace")
    finish(args, model=args.model, dtype=args.dtype, seed=args.seed, milliseconds=steps, floor=floors)


def _seconds(llm: LLM, prompt: list[int], count: int) -> float:
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=count)
    start = time.perf_counter()
    llm.generate([prompt], params, use_tqdm=False)
    return time.perf_counter() - start
