"""`nanovllm complete`: prompts in, completions out."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from nanovllm.cli.options import engine_options, sampling_options
from nanovllm.errors import RequestError
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams

_MAX_TOKENS = 256  # unless the command line or the checkpoint says otherwise; SamplingParams' 16 is a glimpse


def run(args: argparse.Namespace) -> int:
    prompts = _read_prompts(args.prompts)
    given = sampling_options(args)
    SamplingParams(**given)  # a mistake in it should not wait for the model
    with LLM(args.model, **engine_options(args)) as llm:
        params = sampling_params(llm, given, _MAX_TOKENS)
        if len(prompts) == 1 and params.n == 1:
            for piece in llm.stream(prompts[0], params):
                print(piece, end="", flush=True)
            print()
            return 0
        for output in llm.generate(prompts, params, use_tqdm=sys.stderr.isatty()):
            for completion in output.outputs:
                number = f" ({completion.index + 1} of {params.n})" if params.n > 1 else ""
                print(f"=== {output.prompt!r}{number}\n{completion.text}")
    return 0


def sampling_params(llm: LLM, given: dict[str, Any], max_tokens: int | None) -> SamplingParams:
    """What was given goes before the checkpoint's defaults, and those before max_tokens."""
    return SamplingParams(**{"max_tokens": max_tokens, **llm.engine.sampling_defaults, **given})


def _read_prompts(prompts: list[str]) -> list[str]:
    if not prompts:
        if sys.stdin.isatty():
            raise RequestError("no prompt: give one as an argument, or through a pipe")
        prompts = ["-"]
    if prompts.count("-") > 1:
        raise RequestError("`-` stands for the standard input, which can be read once")
    return [sys.stdin.read().removesuffix("\n") if p == "-" else p for p in prompts]
