"""Sampler: from logits to tokens, each row by its own parameters and its own random stream.

Every cut keeps or drops tokens by value, and the draw walks the vocabulary in order with one
uniform number, so that a row's token depends on its logits, its seed and its index alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from nanovllm.layers.logits_processors import changes_logits, process_logits
from nanovllm.sample_row import SampleRow, TokenLogprobs

# Nucleus sampling looks at this many likeliest tokens before it sorts the whole vocabulary.
_FIRST_LOOK = 512
# Logits over this temperature are all alike; a higher one would leave fp32's range.
_HIGHEST_TEMPERATURE = 1e20


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> tuple[np.ndarray, list[TokenLogprobs | None]]:
    """Draw a token for each row of fp32 logits [R, V], which are changed in place.

    Returns int64 [R] and, for rows that ask, log probabilities of the unchanged logits.
    """
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    raw = logits[wanted].log_softmax(dim=-1) if wanted else None
    if changing := [i for i, row in enumerate(rows) if changes_logits(row)]:
        part = logits[changing]
        process_logits(part, [rows[i] for i in changing])
        logits[changing] = part
    token_ids = _draw(logits, rows)
    logprobs: list[TokenLogprobs | None] = [None] * len(rows)
    if raw is not None:
        counts = [rows[i].params.logprobs for i in wanted]
        for i, found in zip(wanted, token_logprobs(raw, token_ids[wanted], counts), strict=True):
            logprobs[i] = found
    return token_ids, logprobs


def token_logprobs(logprobs: torch.Tensor, token_ids: np.ndarray, counts: Sequence[int | None]) -> list[TokenLogprobs]:
    """For each row [V] of log probabilities: the given token, its rank, and the likeliest `count`
    (-1: all of the vocabulary), ties by token id."""
    actual = torch.from_numpy(token_ids).to(logprobs.device)[:, None]
    chosen = logprobs.gather(1, actual)
    ranks = (logprobs > chosen).sum(dim=1) + 1
    sizes = [logprobs.shape[1] if count == -1 else count or 0 for count in counts]
    largest = logprobs.topk(max(sizes), dim=1).values
    found = []
    for i, (size, rank) in enumerate(zip(sizes, ranks.tolist(), strict=True)):
        ids = actual[i]
        if size:
            likeliest = (logprobs[i] >= largest[i, size - 1]).nonzero().squeeze(1)
            order = logprobs[i, likeliest].argsort(descending=True, stable=True)[:size]
            ids = torch.cat([ids, likeliest[order]])
        found.append(TokenLogprobs(ids.cpu().numpy(), logprobs[i, ids].cpu().numpy(), rank))
    return found


def uniforms(rows: Sequence[SampleRow]) -> np.ndarray:
    """One float64 in [0, 1) a row: SplitMix64 (Steele et al. 2014) of the seed, then of the index."""
    seeds = np.array([row.seed & (2**64 - 1) for row in rows], dtype=np.uint64)
    indices = np.array([row.index for row in rows], dtype=np.uint64)
    bits = _splitmix64(_splitmix64(seeds) + indices)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(state: np.ndarray) -> np.ndarray:
    z = state + np.uint64(0x9E3779B97F4A7C15)  # wraps around, as it should
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _draw(logits: torch.Tensor, rows: Sequence[SampleRow]) -> np.ndarray:
    random = [i for i, row in enumerate(rows) if not row.params.greedy]
    if not random:
        return logits.argmax(dim=-1).cpu().numpy()
    token_ids = np.empty(len(rows), dtype=np.int64)
    if greedy := [i for i, row in enumerate(rows) if row.params.greedy]:
        token_ids[greedy] = logits[greedy].argmax(dim=-1).cpu().numpy()
    chosen = [rows[i] for i in random]
    part = logits[random] if greedy else logits
    temperatures = torch.tensor(
        [min(row.params.temperature, _HIGHEST_TEMPERATURE) for row in chosen], device=logits.device
    )
    part = part / temperatures[:, None]
    _truncate(part, chosen)
    token_ids[random] = _inverse_cdf(part, uniforms(chosen))
    return token_ids


def _inverse_cdf(logits: torch.Tensor, u: np.ndarray) -> np.ndarray:
    """The token where the cumulative mass, in order of the vocabulary, first exceeds u."""
    mass = _weights(logits).cumsum(dim=-1, dtype=torch.float64)
    total = mass[:, -1:]
    target = torch.from_numpy(u).to(logits.device)[:, None] * total
    # u * total may round up to total; stay below, or no token would exceed it
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(mass, target, right=True)
    # a broken model's NaN must not become a token id outside the vocabulary, which would harm the batch
    return drawn.clamp(max=logits.shape[1] - 1).squeeze(1).cpu().numpy()


def _weights(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities up to a factor: exp(logit - largest)."""
    return (logits - logits.amax(dim=-1, keepdim=True)).exp()


def _truncate(logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    """Set what the rows' cuts drop to minus infinity: min_p, top_k, top_p, typical_p in turn."""
    vocab_size = logits.shape[1]
    steps: list[tuple[Callable[[torch.Tensor, list[float]], torch.Tensor], list[float], float]] = [
        (_min_p_keeps, [row.params.min_p for row in rows], 0.0),
        (_top_k_keeps, [row.params.top_k if row.params.top_k < vocab_size else 0 for row in rows], 0),
        (_top_p_keeps, [row.params.top_p for row in rows], 1.0),
        (_typical_p_keeps, [row.params.typical_p for row in rows], 1.0),
    ]
    for keeps, values, off in steps:
        users = [i for i, value in enumerate(values) if value != off]
        if users:
            part = logits[users]
            keep = keeps(part, [values[i] for i in users])
            logits[users] = part.masked_fill_(~keep, float("-inf"))


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _min_p_keeps(logits: torch.Tensor, min_p: list[float]) -> torch.Tensor:
    return _weights(logits) >= _column(min_p, logits)


def _top_k_keeps(logits: torch.Tensor, top_k: list[float]) -> torch.Tensor:
    sizes = torch.tensor(top_k, dtype=torch.int64, device=logits.device)[:, None]
    smallest = logits.topk(int(max(top_k)), dim=-1).values.gather(1, sizes - 1)
    return logits >= smallest


def _top_p_keeps(logits: torch.Tensor, top_p: list[float]) -> torch.Tensor:
    share = _column(top_p, logits)
    total = _weights(logits).cumsum(dim=-1, dtype=torch.float64)[:, -1:]
    smallest = torch.empty_like(share, dtype=logits.dtype)
    todo = torch.arange(len(logits), device=logits.device)
    for size in (min(_FIRST_LOOK, logits.shape[1]), logits.shape[1]):
        likeliest = logits[todo].topk(size, dim=-1).values
        mass = _weights(likeliest).cumsum(dim=-1, dtype=torch.float64)
        # how many fall short of the share; the next one completes it
        count = (mass < share[todo] * total[todo]).sum(dim=-1, keepdim=True)
        found = (count < size).squeeze(1) if size < logits.shape[1] else torch.ones_like(todo, dtype=torch.bool)
        smallest[todo] = likeliest.gather(1, count.clamp(max=size - 1))
        todo = todo[~found]
        if not len(todo):
            break
    return logits >= smallest


def _typical_p_keeps(logits: torch.Tensor, typical_p: list[float]) -> torch.Tensor:
    """Tokens whose surprise is nearest to the entropy, up to the mass (Meister et al. 2022)."""
    logprobs = logits.double().log_softmax(dim=-1)
    probs = logprobs.exp()
    # not sum(): its rounding depends on how many rows there are
    entropy = -(probs * logprobs).nan_to_num(0.0).cumsum(dim=-1)[:, -1:]
    distance = (-logprobs - entropy).abs()  # infinite for tokens that are out already
    ordered, order = distance.sort(dim=-1)
    mass = probs.gather(1, order).cumsum(dim=-1)
    count = (mass < _column(typical_p, logits)).sum(dim=-1, keepdim=True)
    return distance <= ordered.gather(1, count.clamp(max=logits.shape[1] - 1))
