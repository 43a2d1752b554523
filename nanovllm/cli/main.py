"""The command line: what can be given, and what happens to errors. Each subcommand has a file."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nanovllm import __version__
from nanovllm.cli.options import add_engine_options, add_sampling_options
from nanovllm.errors import NanoVLLMError

_MODEL_HELP = "a Hugging Face directory, a .gguf file, a Hub repository or an alias (see `nanovllm models`)"
_TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
_PLAN_OPTIONS = (
    "revision",
    "model_impl",
    "model_plugin",
    "dtype",
    "quantization",
    "device",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "kvcache_block_size",
    "kv_cache_dtype",
    "attention_backend",
    "kernels",
    "enable_prefix_caching",
    "enable_expert_parallel",
    "batch_invariant",
)
_PARITY_OPTIONS = (
    "revision",
    "model_impl",
    "model_plugin",
    "device",
    "attention_backend",
    "kernels",
    "kvcache_block_size",
    "kvcache_memory",
)
_VERIFY_OPTIONS = (
    *_PARITY_OPTIONS,
    "dtype",
    "quantization",
    "quantize_activations",
    "kv_cache_dtype",
    "batch_invariant",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `nanovllm ARGV...`; the exit status: 0, 1 for a negative verdict (plan, parity, verify), 2
    for errors, 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="nanovllm: %(message)s")
    try:
        status = importlib.import_module(f"nanovllm.cli.{args.command.replace('-', '_')}").run(args)
        sys.stdout.flush()
    except NanoVLLMError as error:
        print("nanovllm: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough, as in `nanovllm models | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
        return 141
    return status


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nanovllm", description="A small, exact LLM inference engine.")
    parser.add_argument("--version", action="version", version=f"nanovllm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--verbose", action="store_true", help="show what the engine logs")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common], allow_abbrev=False)

    _add_complete(command("complete", "Complete prompts; one alone is streamed."))
    _add_chat(command("chat", "Chat in the terminal, or by pipe with one turn a line."))
    _add_run_batch(command("run-batch", "Answer a file of requests in OpenAI's batch format."))
    command("models", "List what runs here: architectures, aliases, and models that are cached.")
    _add_plan(command("plan", "Work out the memory that a model takes, before loading anything."))
    _add_parity(command("parity", "Compare logits and greedy text with transformers'."))
    _add_eval(command("eval", "Measure what a dtype or a quantisation costs, against float32."))
    _add_verify(command("verify", "Check that logits keep their bits in any company, order and memory."))
    return parser


def _add_complete(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", required=True, help=_MODEL_HELP)
    text = "`-`, or none with a pipe: the standard input, without its last line break"
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help=text)
    add_sampling_options(parser, n=True)
    add_engine_options(parser)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", required=True, help=_MODEL_HELP)
    parser.add_argument("--system-prompt", metavar="TEXT", help="goes before the conversation")
    parser.add_argument("--chat-template", metavar="FILE", type=_text_of, help="a Jinja template, not the model's own")
    add_sampling_options(parser, n=False)
    add_engine_options(parser)


def _add_run_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", help="requests for /v1/chat/completions and /v1/completions, one a line")
    text = (
        "answers in the order of IN; until all are there they are in OUT.partial. If either exists it is gone on "
        "with: lines that have an answer, by their custom_id, keep it, and errors are tried again"
    )
    parser.add_argument("output", metavar="OUT", help=text)
    parser.add_argument("-m", "--model", required=True, help=_MODEL_HELP)
    parser.add_argument("--overwrite", action="store_true", help="forget what OUT and OUT.partial hold")
    text = "what requests and responses call the model (repeatable; responses have the first; default: MODEL)"
    parser.add_argument("--served-model-name", action="append", metavar="NAME", help=text)
    parser.add_argument("--chat-template", metavar="FILE", type=_text_of, help="a Jinja template, not the model's own")
    text = "replicas of the engine on a Ray cluster: that of RAY_ADDRESS, one that runs here, or this machine alone"
    parser.add_argument("--ray", action="store_true", help=text)
    text = "with --ray (default: as many as there are GPUs, or groups of tensor-parallel ones; without GPUs, nodes)"
    parser.add_argument("--replicas", type=_positive, metavar="N", help=text)
    add_engine_options(parser)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"{_MODEL_HELP}, or a config.json")
    parser.add_argument("--memory", metavar="SIZE", help="to plan with, such as 8GiB; default what is free here")
    parser.add_argument("--tp", type=_positive, default=1, metavar="N", help="ranks to divide the model over")
    add_engine_options(parser, only=_PLAN_OPTIONS)


def _add_parity(parser: argparse.ArgumentParser) -> None:
    _add_model_or_random(parser)
    parser.add_argument("--layers", action="store_true", help="compare module by module; name the first to differ")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of both sides")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="to compare on (repeatable)")
    parser.add_argument("--max-tokens", type=_positive, default=32, metavar="N", help="greedy text to compare (32)")
    text = "largest difference of a logit, as a share of the largest logit (default: {})"
    defaults = ", ".join(f"{value:g} in {dtype}" for dtype, value in _TOLERANCES.items())
    parser.add_argument("--tolerance", type=float, metavar="X", help=text.format(defaults))
    parser.set_defaults(tolerances=_TOLERANCES)
    add_engine_options(parser, only=_PARITY_OPTIONS)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    text = "to read (default: texts that the model writes itself, in float32)"
    parser.add_argument("--text", metavar="FILE", type=_text_of, help=text)
    parser.add_argument("--tokens", type=_positive, default=2048, metavar="N", help="at most so many (2048)")
    add_engine_options(parser, only=_VERIFY_OPTIONS)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _add_model_or_random(parser)
    text = "to serve (repeatable; default: random token ids, as long as a word and as a paragraph)"
    parser.add_argument("--prompt", action="append", metavar="TEXT", help=text)
    parser.add_argument("--max-tokens", type=_positive, default=8, metavar="N", help="of each request (8)")
    add_engine_options(parser, only=_VERIFY_OPTIONS)


def _add_model_or_random(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=_MODEL_HELP)
    text = "instead of MODEL: a tiny random one like this config.json, directory or model type (such as llama)"
    parser.add_argument("--random", metavar="CONFIG", help=text)


def _text_of(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {file}: {error}") from error


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
