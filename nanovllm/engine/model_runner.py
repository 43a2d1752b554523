"""ModelRunner: one rank's model and caches; turns a StepPlan into a StepResult."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch

from nanovllm.attention.base import AttentionBackend, require_support, select_backend
from nanovllm.batch import Batch
from nanovllm.build_context import BuildContext
from nanovllm.cache_spec import CachePlan, CacheSpec, PagedKVSpec, StateSpec
from nanovllm.config import EngineConfig
from nanovllm.distributed.group import TPGroup
from nanovllm.engine.batch_builder import build_batch
from nanovllm.engine.decode_batch import DecodeBatch
from nanovllm.engine.memory import cache_memory, size_caches
from nanovllm.engine.step import StepPlan, StepResult
from nanovllm.engine.step_graphs import StepGraphs
from nanovllm.engine.threads import set_threads
from nanovllm.errors import ConfigError
from nanovllm.host_memory import mapped_zeros
from nanovllm.layers.attention import CachedLayer
from nanovllm.layers.moe import SparseMoE
from nanovllm.layers.sampler import sample, token_logprobs
from nanovllm.models.base import CausalLM, ModelConfig
from nanovllm.ops.base import select_ops
from nanovllm.ops.graph import CannotRecord, Recorder
from nanovllm.sample_row import TokenLogprobs
from nanovllm.weights.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

# Prompt logprobs need logits for every prompt token; so many rows at a time bound the memory.
_LOGITS_ROWS = 256


class ModelRunner:
    """Owns the model and the cache tensors; complete on construction (loaded, sized, bound)."""

    def __init__(
        self,
        config: EngineConfig,
        model_class: type[CausalLM],
        model_config: ModelConfig,
        checkpoint: Checkpoint,
        *,
        tp: TPGroup | None = None,
        host_rank: int = 0,
        host_ranks: int = 1,
        agree: Callable[[CachePlan], CachePlan] | None = None,
    ) -> None:
        """config: resolved. tp: this rank's place in its group. host_rank, host_ranks: which of how many
        share this host's cores and memory. agree: from what this rank can hold to what all can."""
        assert config.max_model_len is not None
        self._device = torch.device(config.device)
        self._block_size = config.kvcache_block_size
        dtype: torch.dtype = getattr(torch, config.dtype)
        self._backend: AttentionBackend = select_backend(
            config.attention_backend, self._device, dtype, self._block_size
        )
        if self._device.type == "cpu":
            set_threads(config.num_threads, host_rank, host_ranks)
        self._ops = select_ops(config.kernels, self._device, dtype)
        self._tp = tp or TPGroup()
        ctx = BuildContext(
            *(self._device, dtype, self._backend, config.max_model_len, self._tp, self._ops),
            expert_parallel=config.enable_expert_parallel,
            quantization=config.quantization,
        )
        self._model = model_class(model_config, ctx)
        if config.enable_expert_parallel and not any(isinstance(m, SparseMoE) for m in self._model.modules()):
            raise ConfigError("enable_expert_parallel=True: this model has no experts; leave it out")
        if config.load_format == "dummy":
            self._model.load_dummy(config.seed or 0)
        else:
            self._model.load(checkpoint)
        self.cache_plan = self._create_caches(config, host_ranks, agree)
        self._graphs = None if config.enforce_eager else self._step_graphs(config, self._ops.recorder())
        logger.info(
            "%s on %s in %s, kernels %s, attention %s, %d pages of %d tokens (%.2f GiB)",
            model_class.__name__,
            config.device,
            config.dtype,
            self._ops.name,
            self._backend.name,
            self.cache_plan.num_blocks - 1,
            self._block_size,
            self.cache_plan.num_bytes / 2**30,
        )

    @property
    def model(self) -> CausalLM:
        return self._model

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """One forward pass over the planned tokens, then one token for each sequence that samples: drawn by
        rank 0 alone, so that ranks cannot disagree."""
        self._copy_states([(s.resume_from, s.state_slot) for s in plan.sequences if s.resume_from])
        logits, prompt_logprobs = self._logits(plan)
        self._copy_states([(s.state_slot, s.capture_to) for s in plan.sequences if s.capture_to])
        if self._tp.rank > 0:
            return StepResult(np.empty(0, np.int64), [])
        rows = [s.sample for s in plan.sequences if s.sample is not None]
        token_ids, logprobs = sample(logits, rows, self._ops.sampling)
        return StepResult(token_ids, logprobs, prompt_logprobs)

    def _build_batch(self, plan: StepPlan) -> Batch:
        return build_batch(
            plan,
            block_size=self._block_size,
            device=self._device,
            backend=self._backend,
            with_states=self.cache_plan.num_slots > 0,
        )

    def _logits(self, plan: StepPlan) -> tuple[torch.Tensor, dict[int, list[TokenLogprobs]]]:
        """Of the rows that are sampled, and what was asked about prompts."""
        if self._graphs is not None and all(s.prompt_targets is None for s in plan.sequences):
            try:
                return self._graphs.logits(plan), {}
            except CannotRecord as error:
                logger.info("steps run op by op: %s cannot be recorded", error)
                self._graphs = None
        batch = self._build_batch(plan)
        hidden = self._model(batch)  # [T, H]
        prompt_logprobs = self._prompt_logprobs(plan, hidden)
        return self._sampled_logits(hidden, batch), prompt_logprobs

    def _sampled_logits(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self._model.compute_logits(self._ops.gather(hidden, batch.logits_rows))

    def _copy_states(self, moves: list[tuple[int, int]]) -> None:
        """Copy whole slots (from, to); all are read before any is written."""
        if moves:
            sources, targets = torch.tensor(moves, device=self._device).T
            for state in self._states:
                state.index_copy_(0, targets, state.index_select(0, sources))

    def _prompt_logprobs(self, plan: StepPlan, hidden: torch.Tensor) -> dict[int, list[TokenLogprobs]]:
        found: dict[int, list[TokenLogprobs]] = {}
        row = 0
        for s in plan.sequences:
            if s.prompt_targets is not None:
                mine = found[s.seq_id] = []
                for i in range(0, len(s.prompt_targets), _LOGITS_ROWS):
                    targets = s.prompt_targets[i : i + _LOGITS_ROWS].astype(np.int64)
                    logits = self._model.compute_logits(hidden[row + i : row + i + len(targets)])
                    counts = [s.num_prompt_logprobs] * len(targets)
                    if self._tp.rank == 0:
                        mine += token_logprobs(self._ops.sampling.log_softmax(logits), targets, counts)
            row += s.num_tokens
        return found

    def _step_graphs(self, config: EngineConfig, recorder: Recorder | None) -> StepGraphs | None:
        if recorder is None or self._backend.name != "native":
            return None
        assert config.max_model_len is not None
        decoding = DecodeBatch(
            max_num_seqs=config.max_num_seqs,
            max_pages=-(-config.max_model_len // self._block_size),
            block_size=self._block_size,
        )
        return StepGraphs(
            self._build_batch, lambda batch: self._sampled_logits(self._model(batch), batch), recorder, decoding
        )

    def _create_caches(
        self, config: EngineConfig, host_ranks: int, agree: Callable[[CachePlan], CachePlan] | None
    ) -> CachePlan:
        """Size the caches of all layers together, allocate and bind them."""
        layers = [m for m in self._model.modules() if isinstance(m, CachedLayer)]
        specs = [layer.cache_spec for layer in layers]
        for spec in specs:
            if isinstance(spec, PagedKVSpec):
                require_support(self._backend, self._device, spec, self._block_size)
        plan = size_caches(specs, cache_memory(config, self._device, host_ranks), config)
        plan = plan if agree is None else agree(plan)
        self._states: list[torch.Tensor] = []
        for layer, spec in zip(layers, specs, strict=True):
            tensors = self._cache_tensors(spec, plan)
            layer.bind(*tensors)
            if isinstance(spec, StateSpec):
                self._states += tensors
        return plan

    def _cache_tensors(self, spec: CacheSpec, plan: CachePlan) -> list[torch.Tensor]:
        if isinstance(spec, PagedKVSpec):
            return [self._zeros(self._backend.kv_shape(spec, plan.num_blocks, self._block_size), spec.dtype)]
        return [self._zeros((plan.num_slots, *s), d) for s, d in zip(spec.shapes, spec.dtypes, strict=True)]

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeroed, because masked-out garbage times zero must not be NaN."""
        if self._device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=self._device)
        return mapped_zeros(shape, dtype)
