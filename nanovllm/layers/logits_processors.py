"""What requests ask to change in the logits before a token is drawn.

Each processor works in place on fp32 logits [R, V] and looks only at the rows that use it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nanovllm.sample_row import SampleRow

# Repetition penalties beyond these would take logits out of fp32's range.
_SMALLEST_PENALTY, _LARGEST_PENALTY = 1e-20, 1e20


def process_logits(logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    """Apply all processors in vLLM's order: who may be sampled, then biases, then penalties."""
    for i, row in enumerate(rows):
        params = row.params
        if params.allowed_token_ids is not None:
            _keep_only(logits[i], params.allowed_token_ids)
        banned = [*row.stop_ids, *_completed_bad_words(row)]
        if banned:
            _forbid(logits[i], banned)
        if params.logit_bias:
            ids = list(params.logit_bias)
            logits[i, ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
        if params.uses_penalties:
            _penalise(logits[i], row)


def changes_logits(row: SampleRow) -> bool:
    params = row.params
    return bool(
        params.uses_penalties
        or params.logit_bias
        or params.allowed_token_ids is not None
        or row.stop_ids
        or row.bad_words
    )


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


def _penalise(logits: torch.Tensor, row: SampleRow) -> None:
    """Repetition (Keskar et al. 2019) over prompt and output, then frequency and presence
    (the OpenAI API's) over the output."""
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(np.concatenate([row.prompt, row.output]))).long().to(logits.device)
        values = logits[seen]
        penalty = min(max(params.repetition_penalty, _SMALLEST_PENALTY), _LARGEST_PENALTY)
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if len(row.output) and (params.frequency_penalty or params.presence_penalty):
        ids, counts = np.unique(row.output, return_counts=True)
        amount = params.frequency_penalty * counts + params.presence_penalty
        target = torch.from_numpy(ids).long().to(logits.device)
        logits[target] -= torch.from_numpy(amount).float().to(logits.device)
