"""What requests ask to change in the logits before a token is drawn.

Each processor works in place on fp32 logits [R, V] and looks only at the rows that use it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nanovllm.ops.base import SamplingOps
from nanovllm.sample_row import SampleRow


def process_logits(logits: torch.Tensor, rows: Sequence[SampleRow], ops: SamplingOps) -> None:
    """Apply all processors in vLLM's order: who may be sampled, then biases, then penalties."""
    for i, row in enumerate(rows):
        params = row.params
        if params.allowed_token_ids is not None:
            _keep_only(logits[i], params.allowed_token_ids)
        if row.stop_ids or row.bad_words:
            _forbid(logits[i], [*row.stop_ids, *_completed_bad_words(row)])
        if params.logit_bias:
            ids = list(params.logit_bias)
            logits[i, ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if penalised := {i: row for i, row in enumerate(rows) if row.params.uses_penalties}:
        ops.penalise(logits, penalised)


def _keep_only(logits: torch.Tensor, token_ids: Sequence[int]) -> None:
    ids = torch.tensor(token_ids, device=logits.device)
    kept = logits[ids]
    logits.fill_(float("-inf"))
    logits[ids] = kept


def _forbid(logits: torch.Tensor, token_ids: Sequence[int]) -> None:
    """Unless that would leave no token at all (allowed_token_ids that are all bad words, say)."""
    left = logits.clone()
    left[token_ids] = float("-inf")
    logits.copy_(torch.where(left.amax() > float("-inf"), left, logits))


def _completed_bad_words(row: SampleRow) -> list[int]:
    """Last tokens of the bad words whose other tokens have just been written."""
    return [
        word[-1]
        for word in row.bad_words
        if len(word) == 1 or row.output[len(row.output) - len(word) + 1 :].tolist() == list(word[:-1])
    ]
