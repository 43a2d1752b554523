"""`nanovllm plan`: what a model takes and what fits beside it, before anything is loaded."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanovllm.cache_spec import CachePlan
from nanovllm.cli.options import engine_options
from nanovllm.cli.units import size_text
from nanovllm.config import STORED, EngineConfig, parse_bytes
from nanovllm.engine.build import find_model, fit_model_len
from nanovllm.engine.runner.memory import free_host_memory
from nanovllm.engine.runner.memory_plan import Footprint, footprint, plan_memory
from nanovllm.errors import ConfigError
from nanovllm.weights.checkpoint import Checkpoint, open_checkpoint
from nanovllm.weights.hub import resolve_model

_WEIGHTS = (".safetensors", ".bin")
_RANKS = (2, 4, 8, 16)  # to try when one is not enough


def run(args: argparse.Namespace) -> int:
    case = Case.of(args.model, engine_options(args), args.tp)
    memory = parse_bytes("memory", args.memory) if args.memory else _free_memory(case.config)
    _print_footprint(case)
    where = "planned with" if args.memory else "free here"
    print(f"memory             {size_text(memory)} {where}{' on each rank' if args.tp > 1 else ''}")
    try:
        held = case.fit(memory)
    except ConfigError as error:
        print(f"does not fit: {error}")
        for change in _changes(case, memory):
            print(f"  - {change}")
        return 1
    _print_capacity(case, held, memory)
    return 0


@dataclass(frozen=True, slots=True)
class Case:
    """A model with the options and ranks that it would run with."""

    checkpoint: Checkpoint
    architecture: str
    options: dict[str, Any]
    tp: int
    config: EngineConfig
    model: Footprint

    @classmethod
    def of(cls, name: str, options: dict[str, Any], tp: int) -> Case:
        return cls.made(open_small_files(name, options.get("revision")), options, tp)

    @classmethod
    def made(cls, checkpoint: Checkpoint, options: dict[str, Any], tp: int) -> Case:
        asked = EngineConfig.from_options(str(checkpoint.path), options)
        family, model_config = find_model(asked, checkpoint)
        config = asked.resolve(
            checkpoint_dtype=checkpoint.dtype,
            max_positions=model_config.max_position_embeddings,
            # a GPU can be planned for without having it
            cuda=options.get("device") == "cuda" or torch.cuda.is_available(),
            quantized=checkpoint.quantization,
        )
        folder = checkpoint.path
        is_bare = folder.is_dir() and not any(file.suffix in _WEIGHTS for file in folder.iterdir())
        if config.quantization in STORED and is_bare:
            raise ConfigError(
                f"{folder} holds no weights, and what those take that are quantised by {config.quantization!r} "
                "is in the headers of their files: give a folder that has these, or plan for 'dequantize'"
            )
        model = footprint(family, model_config, config, tp, checkpoint)
        return cls(checkpoint, family.__name__, options, tp, config, model)

    def fit(self, memory: int) -> tuple[EngineConfig, CachePlan]:
        """As the engine would: the config with the max_model_len that fits, or ConfigError."""
        plan = plan_memory(self.model, self.config, memory)
        return fit_model_len(self.config, plan, self.options.get("max_model_len")), plan

    def fits(self, memory: int) -> bool:
        try:
            self.fit(memory)
        except ConfigError:
            return False
        return True

    def changed(self, tp: int | None = None, **options: Any) -> Case:
        return Case.made(self.checkpoint, {**self.options, **options}, tp or self.tp)


def open_small_files(name: str, revision: str | None) -> Checkpoint:
    """config.json is enough: itself, a directory with it, or the repository's."""
    path = Path(name).expanduser()
    if path.name == "config.json" and path.is_file():
        return open_checkpoint(path.parent)
    return open_checkpoint(resolve_model(name, revision, files=("config.json",)))


def _free_memory(config: EngineConfig) -> int:
    if config.device == "cpu":
        return free_host_memory()
    if not torch.cuda.is_available():
        raise ConfigError("this machine has no CUDA device to ask: give its memory with --memory")
    return int(torch.cuda.mem_get_info()[1] * config.gpu_memory_utilization)


def _print_footprint(case: Case) -> None:
    model, config = case.model, case.config
    rank = f" on each of {case.tp} ranks" if case.tp > 1 else ""
    scheme = "" if config.quantization in (None, "dequantize") else f", {config.quantization} weights"
    print(f"{case.architecture}, {config.dtype}{scheme} on {config.device}{rank}")
    print(f"weights            {size_text(model.weights)} ({model.weights:,} bytes)")
    if model.replicated:
        parts = ", ".join(f"{name} {size_text(size)}" for name, size in model.replicated.items())
        print(f"  whole on each    {parts}")
    print(f"tables             {size_text(model.tables)} for {config.max_model_len} positions")
    kind = "" if config.kv_cache_dtype == "auto" else f"{config.kv_cache_dtype}, "
    per_token = f"{size_text(model.kv_bytes_per_token)} a token"
    print(f"keys and values    {kind}{per_token}, in pages of {config.kvcache_block_size}")
    if model.state_bytes:
        print(f"recurrent state    {size_text(model.state_bytes)} a sequence")


def _print_capacity(case: Case, held: tuple[EngineConfig, CachePlan], memory: int) -> None:
    config, plan = held
    length = config.max_model_len
    assert length is not None
    tokens = (plan.num_blocks - 1) * config.kvcache_block_size
    left = memory - case.model.weights - case.model.tables
    print(f"left for caches    {size_text(left)}, of which {size_text(plan.num_bytes)} can be used")
    sequences = min(config.max_num_seqs, plan.num_slots - 1 if plan.num_slots else config.max_num_seqs)
    if case.model.kv_bytes_per_token:
        if plan.window is None:
            whole = min(sequences, tokens // length)
            print(f"fits               {tokens:,} tokens; sequences of max_model_len={length:,} at once: {whole}")
            if whole < sequences and tokens // sequences >= config.kvcache_block_size:
                print(f"                   or {sequences} of {tokens // sequences:,}")
        else:
            print(f"fits               {tokens:,} tokens, of which a sequence keeps the last {plan.window:,}")
    else:
        print(f"fits               {sequences} sequences at once")
    if length != case.config.max_model_len:
        print(f"                   max_model_len is lowered from the model's {case.config.max_model_len:,}")
    if config.device == "cpu":
        print(f"The engine takes a share of what is free for caches; all of it: --kvcache-memory {left // 2**20}MiB")
    print("Not counted: what a step computes with, and the libraries themselves.")


def _changes(case: Case, memory: int) -> list[str]:
    """Changes that would make it fit, each of them tried."""
    found = [f"memory of at least {_least_mebibytes(case)} MiB"]
    if case.config.dtype == "float32" and case.changed(dtype="bfloat16").fits(memory):
        found.append("--dtype bfloat16")
    if (length := _longest_that_fits(case, memory)) is not None:
        found.append(f"--max-model-len {length}")
    for tp in _RANKS:
        try:
            if tp > case.tp and case.changed(tp=tp).fits(memory):
                found.append(f"--tp {tp}, with as much memory on each rank")
                break
        except ConfigError:  # heads do not divide by it
            continue
    return found


def _least_mebibytes(case: Case) -> int:
    low, high = 0, 1
    while not case.fits(high * 2**20):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if case.fits(middle * 2**20) else (middle, high)
    return high


def _longest_that_fits(case: Case, memory: int) -> int | None:
    """A max_model_len below the one asked for, if the memory holds any."""
    if case.options.get("max_model_len") is None:
        return None
    options = {k: v for k, v in case.options.items() if k != "max_model_len"}
    try:
        held, _ = Case.made(case.checkpoint, options, case.tp).fit(memory)
    except ConfigError:
        return None
    return held.max_model_len
