"""Sampling by torch: any device, and the reference of the native kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from nanovllm.ops.logprob_table import LogprobTable, table_of
from nanovllm.sample_row import SampleRow, awaits_token
from nanovllm.sampling_params import SamplingParams

# Nucleus sampling looks at this many likeliest tokens before it sorts the whole vocabulary.
_FIRST_LOOK = 512
# Logits over this temperature are all alike; a higher one would leave fp32's range.
HIGHEST_TEMPERATURE = 1e20
# Repetition penalties beyond these would take logits out of fp32's range.
SMALLEST_PENALTY, LARGEST_PENALTY = 1e-20, 1e20


class TorchSampling:
    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(dim=-1)

    def log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(dim=-1)

    def token_logprobs(
        self, logprobs: torch.Tensor, token_ids: torch.Tensor, counts: Sequence[int | None]
    ) -> LogprobTable:
        ranks = (logprobs > logprobs.gather(1, token_ids[:, None])).sum(dim=1) + 1
        sizes = sizes_of(counts, logprobs.shape[1])
        largest = logprobs.topk(max(sizes), dim=1).values
        found = token_ids[:, None].repeat(1, 1 + max(sizes))
        for i, size in enumerate(sizes):
            if size:
                likeliest = (logprobs[i] >= largest[i, size - 1]).nonzero().squeeze(1)
                order = logprobs[i, likeliest].argsort(descending=True, stable=True)[:size]
                found[i, 1 : 1 + size] = likeliest[order]
        return table_of(ranks, found, logprobs, sizes)

    def penalise(self, logits: torch.Tensor, rows: Mapping[int, SampleRow], last: torch.Tensor | None = None) -> None:
        for i, row in rows.items():
            output = row.output
            if awaits_token(row):  # the device is waited for
                assert last is not None
                output = np.append(output[:-1], np.int32(last[i].item()))
            _penalise(logits[i], row.params, row.prompt, output)

    def draw(self, logits: torch.Tensor, rows: Sequence[SampleRow], uniforms: np.ndarray) -> torch.Tensor:
        token_ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        if greedy := [i for i, row in enumerate(rows) if row.params.greedy]:
            token_ids[greedy] = self.argmax(logits[greedy])
        if random := [i for i, row in enumerate(rows) if not row.params.greedy]:
            chosen = [rows[i] for i in random]
            temperatures = [min(row.params.temperature, HIGHEST_TEMPERATURE) for row in chosen]
            part = logits[random] / torch.tensor(temperatures, device=logits.device)[:, None]
            _truncate(part, chosen)
            token_ids[random] = _inverse_cdf(part, uniforms[random])
        return token_ids


def sizes_of(counts: Sequence[int | None], vocab_size: int) -> list[int]:
    """How many likeliest tokens each row is asked for."""
    return [vocab_size if count == -1 else count or 0 for count in counts]


def _penalise(logits: torch.Tensor, params: SamplingParams, prompt: np.ndarray, output: np.ndarray) -> None:
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(np.concatenate([prompt, output]))).long().to(logits.device)
        values = logits[seen]
        penalty = min(max(params.repetition_penalty, SMALLEST_PENALTY), LARGEST_PENALTY)
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if len(output) and (params.frequency_penalty or params.presence_penalty):
        ids, counts = np.unique(output, return_counts=True)
        amount = params.frequency_penalty * counts + params.presence_penalty
        target = torch.from_numpy(ids).long().to(logits.device)
        logits[target] -= torch.from_numpy(amount).float().to(logits.device)


def _inverse_cdf(logits: torch.Tensor, u: np.ndarray) -> torch.Tensor:
    """The token where the cumulative mass, in order of the vocabulary, first exceeds u."""
    mass = _weights(logits).cumsum(dim=-1, dtype=torch.float64)
    total = mass[:, -1:]
    target = torch.from_numpy(u).to(logits.device)[:, None] * total
    # u * total may round up to total; stay below, or no token would exceed it
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(mass, target, right=True)
    # a broken model's NaN must not become a token id outside the vocabulary, which would harm the batch
    return drawn.clamp(max=logits.shape[1] - 1).squeeze(1)


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
