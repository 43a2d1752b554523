"""`nanovllm parity`: our logits and greedy text against transformers', and where they part."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from nanovllm.cli.prompts import Prompt, longest, random_prompts, sizes_with_room, text_prompts
from nanovllm.cli.reference import Reference
from nanovllm.cli.subject import subject
from nanovllm.cli.trace import Divergence, Trace, compare_traces, first_divergence, num_settled, recording
from nanovllm.config import EngineConfig
from nanovllm.errors import ModelNotFound
from nanovllm.llm import LLM
from nanovllm.models.base import CausalLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.weights.checkpoint import Checkpoint

_TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
)


def run(args: argparse.Namespace) -> int:
    tolerance = args.tolerances[args.dtype] if args.tolerance is None else args.tolerance
    with subject(args) as model:
        prompts = _prompts(model.checkpoint, args.prompt)
        options = model.options | {"dtype": args.dtype, "max_model_len": _length(prompts, args.max_tokens)}
        sizes_with_room(EngineConfig.from_options(str(model.path), options), model.checkpoint)
        expected = _reference_side(model.path, prompts, args)
        found = _our_side(model.path, prompts, expected, options, args.layers)
    return _report(prompts, expected, found, tolerance)


@dataclass(frozen=True, slots=True)
class Expected:
    """Of the reference, by prompt: the greedy text, and logits [T, V] of prompt and text together.

    trace: of the longest of these.
    """

    greedy: list[list[int]]
    logits: list[torch.Tensor]
    trace: Trace | None


@dataclass(frozen=True, slots=True)
class Found:
    """The same of ours; modules are compared already."""

    greedy: list[list[int]]
    logits: list[torch.Tensor]
    modules: list[Divergence] | None


def _prompts(checkpoint: Checkpoint, texts: list[str] | None) -> list[Prompt]:
    """The given texts or ours; seeded random ids for a model without a tokenizer."""
    try:
        return text_prompts(checkpoint, texts or _TEXTS)
    except ModelNotFound:
        if texts:
            raise
        return random_prompts(checkpoint.config["vocab_size"], (1, 7, 40))


def _length(prompts: list[Prompt], max_tokens: int) -> int:
    """Of the longest prompt with its text and the token that the engine adds to have its logits."""
    return len(prompts[longest(prompts)].token_ids) + max_tokens + 1


def _reference_side(path: Path, prompts: list[Prompt], args: argparse.Namespace) -> Expected:
    device = getattr(args, "engine_device", "auto")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    reference = Reference(path, args.dtype, device)
    greedy = [reference.greedy(p.token_ids, args.max_tokens) for p in prompts]
    whole = [p.token_ids + tokens for p, tokens in zip(prompts, greedy, strict=True)]
    logits = [reference.logits(token_ids) for token_ids in whole]
    if not args.layers:
        return Expected(greedy, logits, None)
    text = whole[longest(prompts)]
    with recording(reference.model, len(text)) as trace:
        reference.logits(text)
    return Expected(greedy, logits, trace)


def _our_side(path: Path, prompts: list[Prompt], expected: Expected, options: dict[str, Any], layers: bool) -> Found:
    """Greedy text through the engine, page by page; then every text in one pass, with its logits."""
    count = len(expected.greedy[0])
    whole = [p.token_ids + tokens for p, tokens in zip(prompts, expected.greedy, strict=True)]
    budget = max(2048, options["max_model_len"])
    options = {"skip_tokenizer_init": True, "enable_prefix_caching": False, "enforce_eager": True, **options}
    with LLM(str(path), max_num_batched_tokens=budget, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        outputs = llm.generate([p.token_ids for p in prompts], params, use_tqdm=False)
        greedy = [output.outputs[0].token_ids for output in outputs]
        logits = [all_logits(llm, token_ids) for token_ids in whole]
        if not layers:
            return Found(greedy, logits, None)
        text = whole[longest(prompts)]
        (model,) = cast("list[CausalLM]", llm.apply_model(lambda model: model))
        with recording(model, len(text)) as trace:
            all_logits(llm, text)
        assert expected.trace is not None
        return Found(greedy, logits, compare_traces(expected.trace, trace, model))


def all_logits(llm: LLM, token_ids: list[int]) -> torch.Tensor:
    """fp32 [T, V] on the CPU of a prompt that the engine computes in one step, with enforce_eager."""
    seen: list[torch.Tensor] = []
    (model,) = cast("list[CausalLM]", llm.apply_model(lambda model: model))

    def keep(module: nn.Module, args: tuple, hidden: torch.Tensor) -> None:
        seen.append(model.compute_logits(hidden).float().cpu())

    handle = model.register_forward_hook(keep)
    try:
        llm.generate(token_ids, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    finally:
        handle.remove()
    assert len(seen) == 1 and len(seen[0]) == len(token_ids)
    return seen[0]


def _report(prompts: list[Prompt], expected: Expected, found: Found, tolerance: float) -> int:
    print("max |diff| of any logit, also as a share of the largest logit; KL of next-token distributions, in nats")
    print(f"{'tokens':>6} {'max |diff|':>10} {'share':>9} {'KL mean':>9} {'KL max':>9} {'equal greedy':>13}  prompt")
    good = True
    for i, prompt in enumerate(prompts):
        theirs, ours = expected.logits[i], found.logits[i][:, : expected.logits[i].shape[1]]
        difference = (ours - theirs).abs().max().item()
        share = difference / theirs.abs().max().item()
        kl = kl_divergence(theirs, ours)
        equal, margin = _equal_text(prompt, expected.greedy[i], found.greedy[i], theirs)
        note = "" if margin is None else f" (then a gap of {margin:.2g})"
        print(
            f"{len(theirs):>6} {difference:>10.2g} {share:>9.2g} {kl.mean():>9.2g} {kl.max():>9.2g} "
            f"{f'{equal} of {len(expected.greedy[i])}':>13}  {prompt.label}{note}"
        )
        tie = margin is None or margin <= 2 * tolerance * theirs.abs().max().item()
        good &= share <= tolerance and tie  # also false for NaN
    if found.modules is not None:
        _report_modules(found.modules, tolerance, good)
    verdict = "agrees with" if good else "differs from"
    print(f"{verdict} transformers: the tolerance is {tolerance:g} of the largest logit")
    return 0 if good else 1


def kl_divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(expected || found) of the next-token distributions, [T]; in fp64 it can be told from 0."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


def _equal_text(
    prompt: Prompt, expected: list[int], found: list[int], logits: torch.Tensor
) -> tuple[int, float | None]:
    """How many tokens are equal, and how far apart the reference holds the first two that are not."""
    for i, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
        if theirs != ours:
            row = logits[len(prompt.token_ids) - 1 + i]
            return i, (row[theirs] - row[ours]).item()
    return len(expected), None


def _report_modules(modules: list[Divergence], tolerance: float, good: bool) -> None:
    if not any(m.is_block for m in modules):
        print("\nthe layers of this model have other names here, and cannot be compared one by one\n")
        return
    print("\ndifferences of outputs, as shares of a token's largest value:")
    settled = num_settled(modules, tolerance)
    for i, m in enumerate(modules):
        if m.is_block or m.module.count(".") < 2:  # the model's layers and what stands beside them
            note = (
                "  (ends elsewhere in transformers: what follows agrees)"
                if i < settled and m.output > tolerance
                else ""
            )
            print(f"  {m.output:>9.2g}  {m.module}{note}")
    first = None if good else first_divergence(modules, tolerance)
    if first is not None:
        print(f"first to differ: {first.module}, by {first.output:.2g}; its input differs by {first.given:.2g}")
    print()
