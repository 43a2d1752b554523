"""What Triton's sampling has to give, for an interpreter on the CPU and for GPUs."""

from __future__ import annotations

import numpy as np
import torch
from kernels import normal
from sampling_rows import cuts, logits_rows, make_rows

from nanovllm.ops.torch_sampling import TorchSampling
from nanovllm.ops.triton_sampling import TritonSampling
from nanovllm.sample_row import SampleRow
from nanovllm.sampling_params import SamplingParams

TORCH, TRITON = TorchSampling(), TritonSampling()
CUTS = cuts(1e-9)


def assert_drawn(logits: torch.Tensor, rows: list[SampleRow], uniforms: np.ndarray) -> None:
    """Torch's tokens; where a flat row has many on a stretch of 1e-5, on which sums that round differently may end
    at another one, one of these."""
    found = TRITON.draw(logits, rows, uniforms)
    assert found.device == logits.device and found.dtype == torch.int64
    least, most = (TORCH.draw(logits, rows, np.clip(uniforms + by, 0, 1 - 1e-12)) for by in (-1e-5, 1e-5))
    assert (least <= found).all() and (found <= most).all()


def check_tokens(device: str, size: int, cut: dict) -> None:
    """At both ends of what is kept, and between."""
    logits = logits_rows(size).to(device)
    rows = make_rows(SamplingParams(**cut), len(logits))
    for u in (1e-9, 0.1234, 0.5678, 0.98765, 1 - 1e-9):
        assert_drawn(logits, rows, np.full(len(logits), u))


def check_rows_are_their_own(device: str, size: int, cut: dict, broken: float) -> None:
    """A row gives the same token alone, and beside others that hold no numbers; these give some token."""
    logits, uniforms = logits_rows(size).to(device), np.linspace(0, 0.99, 8)
    rows = make_rows(SamplingParams(**cut), 8)
    logits[2], logits[5, size // 2 :] = broken, broken
    found = TRITON.draw(logits, rows, uniforms).tolist()
    assert all(0 <= token < size for token in found)
    for i in (0, 3, 7):
        assert TRITON.draw(logits[i : i + 1], rows[:1], uniforms[i : i + 1]).tolist() == found[i : i + 1]


def check_mixed_rows(device: str, size: int) -> None:
    """Rows of a batch with parameters of their own, in a part of wider rows."""
    wide = torch.cat([logits_rows(size + 5)] * 2)[: len(CUTS)].to(device)
    logits = wide[:, 2 : size + 2]
    rows = [make_rows(SamplingParams(**cut), 1)[0] for cut in CUTS]
    uniforms = np.linspace(0.05, 0.95, len(rows))
    assert_drawn(logits, rows, uniforms)
    assert TRITON.argmax(logits).tolist() == logits.argmax(1).tolist()
    assert TRITON.draw(logits[:0], [], np.empty(0)).shape == (0,)


def check_flat_rows(device: str, size: int) -> None:
    """More candidates than there is place for: the row itself is searched."""
    x = torch.stack([torch.linspace(0, 2, size), normal(size) * 0.1]).to(device)
    for cut in ({"top_k": size - 100}, {"top_p": 0.9, "min_p": 0.2}, {"top_p": 0.999}):
        rows = make_rows(SamplingParams(**cut), 2)
        for u in (1e-9, 0.6):
            assert_drawn(x, rows, np.full(2, u))


PENALTIES = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 1e-40},
    {"presence_penalty": 0.7},
    {"repetition_penalty": 0.8, "presence_penalty": -0.5, "frequency_penalty": 0.25},
]


def check_penalties(device: str, params: dict) -> None:
    rng = np.random.default_rng(0)
    logits = logits_rows(500).to(device)
    rows = {}
    for i, (prompt, output) in {1: (40, 0), 2: (1, 3000), 4: (900, 70), 6: (0, 0), 7: (0, 5)}.items():
        rows[i] = make_rows(SamplingParams(**params), 1, rng.integers(0, 500, prompt), rng.integers(0, 500, output))[0]
    expected, found = logits.clone(), logits.clone()
    TORCH.penalise(expected, rows)
    TRITON.penalise(found, rows)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
    TRITON.penalise(found, {6: rows[6]})
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)


def check_logprobs(device: str) -> None:
    """Ranks, and the likeliest by token id where they are tied."""
    logprobs = TORCH.log_softmax((normal(6, 300) * 2).round().to(device))
    token_ids, counts = torch.tensor([0, 7, 299, 3, 3, 100], device=device), [0, 1, 5, None, 40, -1]

    def of(ops, rows):
        table = ops.token_logprobs(logprobs[rows], token_ids[rows], counts[rows])
        return table.read(table.values.cpu().numpy())

    found, wanted = of(TRITON, slice(None)), of(TORCH, slice(None))
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.token_ids.tolist() == theirs.token_ids.tolist()
        assert mine.logprobs.tolist() == theirs.logprobs.tolist() and mine.rank == theirs.rank
    (alone,) = of(TRITON, slice(3, 4))
    assert alone.token_ids.tolist() == [3] and alone.rank == wanted[3].rank
