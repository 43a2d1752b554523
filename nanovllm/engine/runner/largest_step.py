"""A step as large as any, to see what memory steps take before the caches get the rest."""

from __future__ import annotations

import numpy as np

from nanovllm.config import EngineConfig
from nanovllm.engine.step import PlannedSequence, StepPlan
from nanovllm.sample_row import SampleRow
from nanovllm.sampling_params import SamplingParams

# every cut and penalty, as each has tensors of its own
_PARAMS = SamplingParams(top_k=50, top_p=0.9, min_p=0.1, repetition_penalty=1.1, logprobs=20)


def largest_step(config: EngineConfig) -> StepPlan:
    """The whole budget, shared by as many sequences as may run, at the end of the longest context. It writes to
    page 0 and slot 0 alone. config: resolved."""
    assert config.max_model_len is not None and config.max_num_batched_tokens is not None
    count = min(config.max_num_seqs, config.max_num_batched_tokens)
    tokens = min(config.max_num_batched_tokens // count, config.max_model_len)
    pages = np.zeros(-(-config.max_model_len // config.kvcache_block_size), dtype=np.int32)
    ids = np.zeros(tokens, dtype=np.int32)
    row = SampleRow(_PARAMS, seed=0, index=0, prompt=ids, output=ids[:0])
    start = config.max_model_len - tokens
    return StepPlan([PlannedSequence(i, ids, start, pages, 0, row) for i in range(count)])
