"""ModelRunner: one rank's model and caches; turns a StepPlan into a StepResult."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import torch

from nanovllm.attention.base import AttentionBackend, select_backend
from nanovllm.attention.codes import KV_CODES
from nanovllm.batch import Batch
from nanovllm.build_context import BuildContext
from nanovllm.cache_spec import CachePlan, PagedKVSpec
from nanovllm.config import EngineConfig
from nanovllm.distributed.group import TPGroup
from nanovllm.engine.runner.batch_builder import build_batch
from nanovllm.engine.runner.caches import bind_caches
from nanovllm.engine.runner.cuda_graph import CUDARecorder, DecodeGraphs
from nanovllm.engine.runner.decode_batch import DeviceDecodeBatch
from nanovllm.engine.runner.largest_step import largest_step
from nanovllm.engine.runner.memory import (
    STEP_DOES_NOT_FIT,
    WEIGHTS_DO_NOT_FIT,
    DeviceMemory,
    host_cache_memory,
    says_what_helps,
    size_caches,
)
from nanovllm.engine.runner.step_batch import StepBatch
from nanovllm.engine.runner.step_graphs import StepGraphs
from nanovllm.engine.runner.threads import set_threads
from nanovllm.engine.step import StepPlan, StepResult, fill_in
from nanovllm.errors import ConfigError
from nanovllm.layers.attention import CachedLayer
from nanovllm.layers.moe import SparseMoE
from nanovllm.layers.sampler import sample
from nanovllm.models.base import CausalLM, ModelConfig
from nanovllm.ops.base import select_ops
from nanovllm.ops.graph import CannotRecord
from nanovllm.ops.native_sampling import NativeSampling
from nanovllm.sample_row import SampleRow, TokenLogprobs, awaits_token
from nanovllm.transfer import Present, to_device, to_host
from nanovllm.weights.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

# Prompt logprobs need logits for every prompt token; so many rows at a time bound the memory.
_LOGITS_ROWS = 256

PromptLogprobs = dict[int, list[Future[list[TokenLogprobs]]]]  # by seq_id, so many rows after the other


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
        memory = DeviceMemory(self._device) if self._device.type == "cuda" else None
        self._looks_up = memory is not None  # tokens that plans do not know, on the device
        if memory is None:
            set_threads(config.num_threads, host_rank, host_ranks)
        self._ops = select_ops(
            *(config.kernels, self._device, dtype),
            batch_invariant=config.batch_invariant,
            quantize_activations=config.quantize_activations,
        )
        self._tp = tp or TPGroup()
        ctx = BuildContext(
            *(self._device, dtype, config.max_model_len, self._tp, self._ops),
            expert_parallel=config.enable_expert_parallel,
            quantization=config.quantization,
            kv_codes=KV_CODES[config.kv_cache_dtype],
        )
        with says_what_helps(WEIGHTS_DO_NOT_FIT):
            self._model = model_class(model_config, ctx)
        if config.enable_expert_parallel and not any(isinstance(m, SparseMoE) for m in self._model.modules()):
            raise ConfigError("enable_expert_parallel=True: this model has no experts; leave it out")
        self._layers = [m for m in self._model.modules() if isinstance(m, CachedLayer)]
        self._backend = self._select_backend(config)
        with says_what_helps(WEIGHTS_DO_NOT_FIT):
            if config.load_format == "dummy":
                self._model.load_dummy(config.seed or 0)
            else:
                self._model.load(checkpoint)
        self._sampled = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=self._device)  # in the last step
        self._host_sampled = self._sampled.numpy() if memory is None else np.zeros(0, dtype=np.int64)  # the same memory
        if memory is None:
            budget = host_cache_memory(config, host_ranks)
        else:
            budget = memory.left(config, lambda: self._try_largest_step(config))
            self._graphs = None  # of other caches: their memory is for those that are recorded below
            torch.cuda.empty_cache()
        plan = size_caches([layer.cache_spec for layer in self._layers], budget, config)
        self.cache_plan = plan if agree is None else agree(plan)
        self._bind_caches(self.cache_plan)
        self._graphs = self._record_steps(config)
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

    @says_what_helps(STEP_DOES_NOT_FIT)
    def execute(self, plan: StepPlan) -> Future[StepResult]:
        """Begin a forward pass over the planned tokens, then one token for each sequence that samples: drawn by
        rank 0 alone, so that ranks cannot disagree. On CPUs it is done when this returns."""
        self._take_pending(plan)
        graphs = self._graphs
        if isinstance(graphs, StepGraphs) and self._tp.rank == 0 and graphs.samples(plan):
            try:
                token_ids = graphs.tokens(plan)
            except CannotRecord as error:
                self._record_no_more(error)
            else:
                self._host_sampled[: len(token_ids)] = token_ids
                return Present(StepResult(token_ids, [None] * len(token_ids)))
        return self._execute(plan)

    @torch.inference_mode()
    def _execute(self, plan: StepPlan) -> Future[StepResult]:
        self._copy_states([(s.resume_from, s.state_slot) for s in plan.sequences if s.resume_from])
        logits, prompt_logprobs = self._logits(plan)
        self._copy_states([(s.state_slot, s.capture_to) for s in plan.sequences if s.capture_to])
        if self._tp.rank > 0:
            return to_host([self._sampled[:0]], lambda none: StepResult(none, []))
        rows = [s.sample for s in plan.sequences if s.sample is not None]
        drawn = sample(logits, rows, self._ops.sampling, self._last_tokens(plan, rows))
        self._sampled[: len(rows)].copy_(drawn.token_ids)

        def result(token_ids: np.ndarray, logprobs: list[TokenLogprobs | None]) -> StepResult:
            # what was copied before has arrived before
            found = {seq_id: [x for part in parts for x in part.result()] for seq_id, parts in prompt_logprobs.items()}
            return StepResult(token_ids, logprobs, found)

        return drawn.to_host(result)

    def _take_pending(self, plan: StepPlan) -> None:
        """See that the tokens that the plan does not know are where they are looked up: on GPUs, on the device."""
        if all(s.follows < 0 for s in plan.sequences):
            return
        if self._tp.size > 1:
            self._sampled.copy_(self._tp.gather(self._sampled[None], len(self._sampled))[0])
        if not self._looks_up:
            fill_in(plan, self._host_sampled)

    def _last_tokens(self, plan: StepPlan, rows: list[SampleRow]) -> torch.Tensor | None:
        """int64 [R]: of the rows that wait for theirs; None if no sampling reads it."""
        if not self._looks_up or not any(awaits_token(row) and _reads_output(row) for row in rows):
            return None
        follows = np.array([max(0, s.follows) for s in plan.sequences if s.sample is not None])
        return self._sampled[to_device([follows], self._device)[0]]

    def _build_batch(self, plan: StepPlan) -> Batch:
        return build_batch(
            plan,
            block_size=self._block_size,
            device=self._device,
            backend=self._backend,
            with_states=bool(self._states),
            sampled=self._sampled if self._looks_up else None,
        )

    def _logits(self, plan: StepPlan) -> tuple[torch.Tensor, PromptLogprobs]:
        """Of the rows that are sampled, and what was asked about prompts."""
        if self._graphs is not None and self._graphs.takes(plan):
            try:
                return self._graphs.logits(plan), {}
            except CannotRecord as error:
                self._record_no_more(error)
        batch = self._build_batch(plan)
        hidden = self._model(batch)  # [T, H]
        prompt_logprobs = self._prompt_logprobs(plan, hidden)
        return self._sampled_logits(hidden, batch), prompt_logprobs

    def _record_no_more(self, error: CannotRecord) -> None:
        logger.info("steps run op by op: %s cannot be recorded", error)
        self._graphs = None

    def _sampled_logits(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self._model.compute_logits(self._ops.gather(hidden, batch.logits_rows))

    def _copy_states(self, moves: list[tuple[int, int]]) -> None:
        """Copy whole slots (from, to); all are read before any is written."""
        if moves:
            sources, targets = to_device([np.array(moves).T], self._device)[0]
            for state in self._states:
                state.index_copy_(0, targets, state.index_select(0, sources))

    def _prompt_logprobs(self, plan: StepPlan, hidden: torch.Tensor) -> PromptLogprobs:
        found: PromptLogprobs = {}
        sampling = self._ops.sampling
        row = 0
        for s in plan.sequences:
            if s.prompt_targets is not None:
                mine = found[s.seq_id] = []
                for i in range(0, len(s.prompt_targets), _LOGITS_ROWS):
                    targets = s.prompt_targets[i : i + _LOGITS_ROWS].astype(np.int64)
                    logits = self._model.compute_logits(hidden[row + i : row + i + len(targets)])
                    counts = [s.num_prompt_logprobs] * len(targets)
                    if self._tp.rank == 0:
                        (token_ids,) = to_device([targets], self._device)
                        table = sampling.token_logprobs(sampling.log_softmax(logits), token_ids, counts)
                        mine.append(to_host([table.values], table.read))
            row += s.num_tokens
        return found

    def _select_backend(self, config: EngineConfig) -> AttentionBackend:
        specs = [layer.cache_spec for layer in self._layers if isinstance(layer.cache_spec, PagedKVSpec)]
        return select_backend(
            *(config.attention_backend, self._device, specs, self._block_size), batch_invariant=config.batch_invariant
        )

    def _bind_caches(self, plan: CachePlan) -> None:
        self._states = bind_caches(
            self._layers, plan, backend=self._backend, block_size=self._block_size, device=self._device
        )

    def _try_largest_step(self, config: EngineConfig) -> None:
        """Take all memory that steps take, with caches of the write sinks alone."""
        self._bind_caches(CachePlan(num_blocks=1, num_slots=1, num_bytes=0))
        self._graphs = self._record_steps(config)
        self._execute(largest_step(config)).result()

    @torch.inference_mode()
    def _record_steps(self, config: EngineConfig) -> StepGraphs | DecodeGraphs | None:
        """None where steps run op by op."""
        assert config.max_model_len is not None and config.max_num_batched_tokens is not None
        if config.enforce_eager:
            return None
        size = {
            "max_num_seqs": config.max_num_seqs,
            "max_pages": -(-config.max_model_len // self._block_size),
            "block_size": self._block_size,
        }

        def forward(batch: Batch) -> torch.Tensor:
            return self._sampled_logits(self._model(batch), batch)

        if self._device.type == "cuda":
            decoding = DeviceDecodeBatch(self._sampled, **size)
            graphs = DecodeGraphs(forward, CUDARecorder(self._device), decoding, self._backend)
            try:
                graphs.capture_early()
            except CannotRecord as error:
                logger.info("steps run op by op: %s", error)
                return None
            return graphs
        recorder = self._ops.recorder()
        if recorder is None or self._backend.name != "native":
            return None
        sampling = self._ops.sampling
        assert isinstance(sampling, NativeSampling)
        batch = StepBatch(max_num_batched_tokens=config.max_num_batched_tokens, **size)
        return StepGraphs(forward, sampling, recorder, batch)


def _reads_output(row: SampleRow) -> bool:
    return row.params.uses_penalties or bool(row.bad_words)
