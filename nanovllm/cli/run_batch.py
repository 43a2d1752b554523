"""`nanovllm run-batch`: requests in OpenAI's batch format, answered into a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from nanovllm.cli.batch_engine import Server, answer_here
from nanovllm.cli.batch_input import Work, plan_work
from nanovllm.cli.batch_output import Answers, Earlier, earlier_answers, partial_of
from nanovllm.cli.batch_ray import answer_with_ray
from nanovllm.cli.options import engine_options
from nanovllm.errors import ConfigError


def run(args: argparse.Namespace) -> int:
    server = Server(args.model, engine_options(args), args.served_model_name or [args.model], args.chat_template)
    file, out = Path(args.input), Path(args.output)
    _check(server, file, out, args)
    earlier = Earlier({}, 0) if args.overwrite else earlier_answers(out, server.served)
    work = plan_work(file, earlier.answers)
    with Answers(out, earlier, work) as answers:
        if work.asked:
            _answer(server, work, answers, args)
        answers.finish()
    return 0


def _check(server: Server, file: Path, out: Path, args: argparse.Namespace) -> None:
    """ConfigError for what would go wrong later, or harm a file."""
    config = server.config
    if config.skip_tokenizer_init:
        raise ConfigError("run-batch reads and writes text: leave --skip-tokenizer-init out")
    if config.executor not in ("auto", "mp"):
        raise ConfigError(f"--executor {config.executor} does not go with run-batch, whose file has one writer")
    if args.replicas is not None and not args.ray:
        raise ConfigError("--replicas needs --ray")
    if not file.is_file():
        raise ConfigError(f"{file} is not a file")
    for other in (out, partial_of(out)):
        if other.exists() and (not other.is_file() or other.samefile(file)):
            raise ConfigError(f"{other} cannot be written: it is the input, or no file")


def _answer(server: Server, work: Work, answers: Answers, args: argparse.Namespace) -> None:
    source = answer_with_ray(server, work, args.replicas) if args.ray else answer_here(server, work)
    done = work.size - len(work.asked)
    failed, tokens = len(work.refused), 0
    with tqdm(total=work.size, initial=done, desc="Answering", unit="req", dynamic_ncols=True, disable=None) as bar:
        for place, answer in source:
            answers.add(place, answer.line)
            failed += answer.failed
            tokens += answer.tokens
            bar.set_postfix_str(f"{tokens} tok, {failed} errors", refresh=False)
            bar.update()
