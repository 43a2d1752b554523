"""From an EngineConfig to a running engine: find the files, read them, load, size."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

from nanovllm.cache_spec import CachePlan
from nanovllm.config import EngineConfig
from nanovllm.engine.executors.base import Executor, InProcessExecutor
from nanovllm.engine.executors.mp import MultiprocessExecutor
from nanovllm.engine.executors.ray import RayExecutor
from nanovllm.engine.executors.torchrun import TorchrunExecutor, launched_processes
from nanovllm.engine.generation_config import generation_defaults
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ConfigError
from nanovllm.models.base import CausalLM, ModelConfig
from nanovllm.models.registry import model_class
from nanovllm.tokenizer.tokenizer import Tokenizer
from nanovllm.weights.checkpoint import Checkpoint, open_checkpoint
from nanovllm.weights.hub import resolve_model

logger = logging.getLogger(__name__)


def build_engine(asked: EngineConfig) -> LLMEngine:
    """Raises ConfigError, ModelNotFound, ModelNotSupported or WeightError."""
    checkpoint = open_checkpoint(resolve_model(asked.model, asked.revision), asked.load_format)
    cls, model_config = find_model(asked, checkpoint)
    config = asked.resolve(
        checkpoint_dtype=checkpoint.dtype,
        max_positions=model_config.max_position_embeddings,
        cuda=torch.cuda.is_available(),
        launched=launched_processes(),
        quantized=checkpoint.quantization,
    )
    tokenizer = _load_tokenizer(asked, checkpoint)
    defaults = generation_defaults(asked, checkpoint)
    executor = create_executor(config, cls, model_config, checkpoint)
    try:
        fitted = fit_model_len(config, executor.capacity, asked.max_model_len)
    except ConfigError:
        executor.close()
        raise
    if fitted != config:
        logger.warning(
            "max_model_len is %d, not the model's %d: the cache memory holds no more",
            fitted.max_model_len,
            config.max_model_len,
        )
    return LLMEngine(
        fitted,
        tokenizer,
        executor,
        vocab_size=model_config.vocab_size,
        eos_ids=_eos_ids(defaults.eos_ids, checkpoint, tokenizer),
        sampling_defaults=defaults.sampling,
    )


def create_executor(
    config: EngineConfig, model_class: type[CausalLM], model_config: ModelConfig, checkpoint: Checkpoint
) -> Executor:
    """Where the ranks are. config: resolved."""
    if config.executor == "torchrun":
        return TorchrunExecutor(config, model_class, model_config, checkpoint)
    if config.executor == "ray":
        return RayExecutor(config, model_class, checkpoint)
    if config.executor == "mp" or config.tensor_parallel_size != 1:
        return MultiprocessExecutor(config, model_class, checkpoint)
    return InProcessExecutor(config, model_class, model_config, checkpoint)


def find_model(asked: EngineConfig, checkpoint: Checkpoint) -> tuple[type[CausalLM], ModelConfig]:
    """The class that runs a checkpoint, and its sizes; ConfigError or ModelNotSupported."""
    cls = model_class(
        checkpoint.config.get("architectures") or [], model_impl=asked.model_impl, model_plugin=asked.model_plugin
    )
    if asked.model_impl == "transformers" and checkpoint.path.is_file():
        raise ConfigError(f"model_impl='transformers' reads Hugging Face directories, not {checkpoint.path.name}")
    if asked.batch_invariant and not cls.row_by_row:
        raise ConfigError(
            f"batch_invariant=True: {checkpoint.path.name} runs through transformers' modules, "
            "which do not promise it; leave it out"
        )
    return cls, cls.read_config(checkpoint.config)


def fit_model_len(config: EngineConfig, capacity: CachePlan, asked: int | None) -> EngineConfig:
    """Lower max_model_len to what the pages hold, so that every admitted request can finish.

    One that the user asked for is kept or refused (ConfigError), never lowered.
    """
    assert config.max_model_len is not None and config.max_num_batched_tokens is not None
    held = capacity.longest_sequence(config.kvcache_block_size, config.max_num_batched_tokens)
    if held is None or config.max_model_len <= held:
        return config
    if asked is not None:
        raise ConfigError(
            f"max_model_len={asked} does not fit: the cache memory holds {held} tokens. Give it more "
            "(kvcache_memory, num_kvcache_blocks or gpu_memory_utilization), or lower max_model_len"
        )
    return dataclasses.replace(config, max_model_len=held)


def _load_tokenizer(config: EngineConfig, checkpoint: Checkpoint) -> Tokenizer | None:
    if config.skip_tokenizer_init:
        return None
    if config.tokenizer is None:
        return checkpoint.load_tokenizer()
    path = resolve_model(config.tokenizer)
    return Tokenizer.from_directory(path) if path.is_dir() else open_checkpoint(path).load_tokenizer()


def _eos_ids(from_generation: list[int], checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> list[int]:
    """Every end-of-sequence token that the files name; there may be several."""
    found: dict[int, None] = {}
    for value in (
        from_generation,
        checkpoint.config.get("eos_token_id"),
        tokenizer.eos_token_id if tokenizer is not None else None,
    ):
        ids: list[Any] = value if isinstance(value, list) else [value]
        found.update(dict.fromkeys(i for i in ids if i is not None))
    return list(found)
