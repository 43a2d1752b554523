"""Sampling of csrc/: rows by themselves, cuts without a sort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from nanovllm.ops.library import Library
from nanovllm.ops.logprob_table import LogprobTable
from nanovllm.ops.torch_sampling import HIGHEST_TEMPERATURE, LARGEST_PENALTY, SMALLEST_PENALTY, TorchSampling
from nanovllm.sample_row import SampleRow

# DrawRow and PenaltyRow of csrc/kernels.h
_DRAW = np.dtype(
    [("min_p", "f8"), ("top_p", "f8"), ("uniform", "f8"), ("top_k", "i8"), ("temperature", "f4")], align=True
)
_MOST = 2**31  # of top_k: more than any vocabulary, and no number for which a row has no room
_PENALTY = np.dtype(
    [
        *((name, "i8") for name in ("row", "prompt", "output", "end")),
        *(("frequency", "f8"), ("presence", "f8"), ("repetition", "f4")),
    ],
    align=True,
)


class NativeSampling:
    """What torch gives up to rounding; the typical cut, which needs a sort, is torch's."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._torch = TorchSampling()

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        return self.draw_by(logits, None)

    def log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        out = torch.empty(logits.shape)
        self._library.log_softmax(
            *(logits.data_ptr(), logits.stride(0), *logits.shape, out.data_ptr(), torch.get_num_threads())
        )
        return out

    def token_logprobs(
        self, logprobs: torch.Tensor, token_ids: torch.Tensor, counts: Sequence[int | None]
    ) -> LogprobTable:
        return self._torch.token_logprobs(logprobs, token_ids, counts)

    def penalise(self, logits: torch.Tensor, rows: Mapping[int, SampleRow], last: torch.Tensor | None = None) -> None:
        assert last is None  # there is no device to know what the host does not
        told, end = [], 0  # in a list: with cold caches each call of numpy's takes some 20 us
        for place, row in rows.items():
            params, prompt, output = row.params, end, end + len(row.prompt)
            end = output + len(row.output)
            repetition = min(max(params.repetition_penalty, SMALLEST_PENALTY), LARGEST_PENALTY)
            told.append((place, prompt, output, end, params.frequency_penalty, params.presence_penalty, repetition))
        table = np.array(told, dtype=_PENALTY)
        seen = np.concatenate([part for row in rows.values() for part in (row.prompt, row.output)])
        self._library.penalise(
            *(logits.data_ptr(), logits.stride(0), logits.shape[1]),
            *(seen.ctypes.data, table.ctypes.data, len(table), torch.get_num_threads()),
        )

    def draw(self, logits: torch.Tensor, rows: Sequence[SampleRow], uniforms: np.ndarray) -> torch.Tensor:
        typical = [i for i, row in enumerate(rows) if row.params.typical_p != 1.0]
        if len(typical) == len(rows):
            return self._torch.draw(logits, rows, uniforms)
        table = self.table(len(rows))
        self.fill(table, rows, uniforms)
        token_ids = self.draw_by(logits, table)
        if typical:
            token_ids[typical] = self._torch.draw(logits[typical], [rows[i] for i in typical], uniforms[typical])
        return token_ids

    def table(self, rows: int) -> np.ndarray:
        """Room for what `draw_by` is told of so many rows."""
        return np.empty(rows, dtype=_DRAW)

    def fill(self, table: np.ndarray, rows: Sequence[SampleRow], uniforms: np.ndarray) -> None:
        """Write what the rows' parameters say, but for the typical cut."""
        table[:] = [
            (p.min_p, p.top_p, u, min(p.top_k, _MOST), 0.0 if p.greedy else min(p.temperature, HIGHEST_TEMPERATURE))
            for p, u in zip([row.params for row in rows], uniforms.tolist(), strict=True)
        ]

    def draw_by(self, logits: torch.Tensor, table: np.ndarray | None) -> torch.Tensor:
        """int64 [R]; where there is no table, the likeliest. Where it is recorded, what lies in the table by then
        counts."""
        token_ids = torch.empty(len(logits), dtype=torch.int64)
        self._library.draw(
            *(logits.data_ptr(), logits.stride(0), *logits.shape),
            *(None if table is None else table.ctypes.data, token_ids.data_ptr(), torch.get_num_threads()),
        )
        return token_ids
