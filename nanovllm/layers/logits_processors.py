"""What requests ask to change in the logits before a token is drawn.

Each processor works in place on fp32 logits [R, V] and looks only at the rows that use it. What these say goes to the
device in one copy for all rows, and nothing waits for what comes of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain

import numpy as np
import torch

from nanovllm.ops.base import SamplingOps
from nanovllm.sample_row import SampleRow, awaits_token
from nanovllm.transfer import to_device

_ANY = -1  # in place of a token that has to come before


def process_logits(
    logits: torch.Tensor, rows: Sequence[SampleRow], ops: SamplingOps, last: torch.Tensor | None = None
) -> None:
    """Apply all processors in vLLM's order: who may be sampled, then biases, then penalties. last: as in `sample`."""
    allowed: dict[int, Sequence[int]] = {}
    forbidden: dict[int, list[tuple[int, int]]] = {}
    biased: dict[int, Mapping[int, float]] = {}
    for i, row in enumerate(rows):
        if row.params.allowed_token_ids is not None:
            allowed[i] = row.params.allowed_token_ids
        if (row.stop_ids or row.bad_words) and (found := [*((t, _ANY) for t in row.stop_ids), *_bad_words(row)]):
            forbidden[i] = found
        if row.params.logit_bias:
            biased[i] = row.params.logit_bias
    if allowed or forbidden or biased:
        tables = [
            *(_numbers(allowed), _owners(allowed), _numbers(chain(*allowed.values()))),
            *(_numbers(forbidden), _owners(dict(enumerate(forbidden.values())))),
            _numbers(chain(*chain(*forbidden.values()))).reshape(-1, 2),
            *(_owners(biased), _numbers(chain(*biased.values()))),
            np.array([bias for biases in biased.values() for bias in biases.values()], dtype=np.float32),
        ]
        on_device = to_device(tables, logits.device)
        if allowed:
            _keep_only(logits, *on_device[:3])
        if forbidden:
            _forbid(logits, last, *on_device[3:6])
        if biased:
            owners, token_ids, biases = on_device[6:]
            logits[owners, token_ids] += biases
    if penalised := {i: row for i, row in enumerate(rows) if row.params.uses_penalties}:
        ops.penalise(logits, penalised, last)


def _numbers(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64)


def _owners(values: Mapping[int, Collection]) -> np.ndarray:
    """int64: of each of the values, end to end, whose it is."""
    return np.repeat(_numbers(values), [len(own) for own in values.values()])


def _keep_only(logits: torch.Tensor, rows: torch.Tensor, owners: torch.Tensor, token_ids: torch.Tensor) -> None:
    """rows: that keep some tokens. owners, token_ids: the row and the number of each of these."""
    kept = logits[owners, token_ids]
    logits.index_fill_(0, rows, float("-inf"))
    logits[owners, token_ids] = kept


def _forbid(
    logits: torch.Tensor, last: torch.Tensor | None, rows: torch.Tensor, owners: torch.Tensor, tokens: torch.Tensor
) -> None:
    """Unless that would leave a row no token at all (allowed_token_ids that are all bad words, say).

    owners [N]: places in `rows`. tokens [N, 2]: with the one that has to be the row's last, or _ANY.
    """
    token_ids, wanted = tokens.T
    vocab_size = logits.shape[1]
    if last is not None:
        token_ids = token_ids.masked_fill((wanted >= 0) & (wanted != last[rows[owners]]), vocab_size)
    banned = torch.zeros(len(rows), vocab_size + 1, dtype=torch.bool, device=logits.device)
    # to assign a number of Python's would make a GPU wait for it
    banned.view(-1).index_fill_(0, owners * (vocab_size + 1) + token_ids, True)
    before = logits[rows]
    left = before.masked_fill(banned[:, :vocab_size], float("-inf"))
    logits[rows] = torch.where(left.amax(dim=1, keepdim=True) > float("-inf"), left, before)


def _bad_words(row: SampleRow) -> list[tuple[int, int]]:
    """Last tokens of the bad words whose other tokens have just been written; and, where the row waits for a token,
    the one that this has to be."""
    awaits = awaits_token(row)
    known = row.output[:-1] if awaits else row.output
    found = []
    for *before, token in row.bad_words:
        wanted = before.pop() if awaits and before else _ANY
        if known[len(known) - len(before) :].tolist() == before:
            found.append((token, wanted))
    return found
