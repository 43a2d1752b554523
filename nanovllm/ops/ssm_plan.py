"""Which tokens of a step torch computes together in a Mamba2 layer; made once for all layers.

A sequence's positions are divided into cells of GRID tokens, from position 0 on and whatever the
chunks in which they come. So a prompt that is cut between two cells is computed in the same sums as
a whole one. A last cell of one token is not worth a cell: it takes the way of decoding sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.batch import Batch

GRID = 64
_CELLS = 4  # computed at once: more would not stay in a CPU's cache
_RUN = 4  # sequences, for the same reason


@dataclass(frozen=True, slots=True)
class CellBlock:
    """N cells of a few sequences: first the next one of each, then the one after it, ...

    taps: [N, h + GRID] for each token of a cell and the h before it, where the buffer has it.
    rows: [N, GRID] the tokens' rows in the batch; `filled` [N, GRID] is false where there is none.
    sources, targets: places in `rows` that hold a token, and its row in the batch.
    states: the sequences' part of ScanPlan.scanned_slots, longest first; widths: how many of them
        have a next cell, one after it, ...
    """

    taps: torch.Tensor
    rows: torch.Tensor
    filled: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    states: slice
    widths: list[int]


@dataclass(frozen=True, slots=True)
class ScanPlan:
    """The convolution reads from a buffer: h tokens before the step for each of B sequences, then the
    step's T tokens.

    slots: [B] of the sequences; fresh_slots: those of sequences that begin in this step.
    tail: [B, h] where the buffer has each sequence's last h tokens.
    blocks, scanned_slots: what goes through cells.
    update_*: R sequences with a single token in their (last) cell: its row in the batch [R], its taps
        [R, h + 1], and runs (slot, first, last) of rows with neighbouring slots.
    """

    slots: torch.Tensor
    fresh_slots: torch.Tensor
    tail: torch.Tensor
    blocks: list[CellBlock]
    scanned_slots: torch.Tensor
    update_rows: torch.Tensor
    update_taps: torch.Tensor
    update_runs: list[tuple[int, int, int]]


def plan_scan(batch: Batch, history: int) -> ScanPlan:
    """history: tokens that the convolution looks back, its kernel less one."""
    assert batch.state_slots is not None
    device = batch.positions.device
    chunks = _Chunks(batch, history)
    single = (chunks.count == 1) | ((chunks.first + chunks.count) % GRID == 1)
    blocks, scanned = _plan_cells(chunks, chunks.count - single.long(), device)
    slots = batch.state_slots.cpu().long()
    updated = single.nonzero().squeeze(1)
    updated = updated[slots[updated].argsort()]
    last = chunks.count[updated] - 1
    everyone = torch.arange(len(slots))[:, None]
    return ScanPlan(
        slots=slots.to(device),
        fresh_slots=slots[chunks.first == 0].to(device),
        tail=chunks.buffer_rows(everyone, chunks.count[:, None] + torch.arange(-history, 0)).to(device),
        blocks=blocks,
        scanned_slots=slots[scanned].to(device),
        update_rows=(chunks.begin[updated] + last).to(device),
        update_taps=chunks.buffer_rows(updated[:, None], last[:, None] + torch.arange(-history, 1)).to(device),
        update_runs=_runs(slots[updated].tolist()),
    )


class _Chunks:
    """Each sequence's part of a step, on the host. begin: [B] row of its first token; first: its
    position; count: tokens."""

    def __init__(self, batch: Batch, history: int) -> None:
        starts = batch.query_start.cpu().long()
        self.begin, self.count = starts[:-1], starts.diff()
        self.first = batch.positions.cpu()[self.begin]
        self.history = history

    def buffer_rows(self, sequence: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Where the buffer has a sequence's tokens; index: from the chunk's begin on, from -history."""
        before = (sequence + 1) * self.history + index
        return torch.where(index < 0, before, len(self.begin) * self.history + self.begin[sequence] + index)


def _plan_cells(chunks: _Chunks, count: torch.Tensor, device: torch.device) -> tuple[list[CellBlock], list[int]]:
    """Blocks, and the sequences that are in them; count: [B] tokens that go through cells."""
    opening = chunks.first // GRID
    num_cells = torch.where(count > 0, (chunks.first + count - 1) // GRID - opening + 1, 0).tolist()
    scanned = sorted((b for b, n in enumerate(num_cells) if n), key=lambda b: -num_cells[b])
    blocks = []
    for start in range(0, len(scanned), _CELLS):
        members = scanned[start : start + _CELLS]
        steps = [[b for b in members if num_cells[b] > step] for step in range(num_cells[members[0]])]
        states = slice(start, start + len(members))
        for first, last in _ranges([len(step) for step in steps]):
            sequence = torch.tensor([b for step in steps[first:last] for b in step])
            widths = [len(step) for step in steps[first:last]]
            cell = opening[sequence] + torch.arange(first, last).repeat_interleave(torch.tensor(widths))
            blocks.append(_block(chunks, count, sequence[:, None], cell[:, None], states, widths, device))
    return blocks, scanned


def _block(
    chunks: _Chunks,
    count: torch.Tensor,  # [B]
    sequence: torch.Tensor,  # [N, 1]
    cell: torch.Tensor,  # [N, 1]
    states: slice,
    widths: list[int],
    device: torch.device,
) -> CellBlock:
    index = cell * GRID + torch.arange(-chunks.history, GRID) - chunks.first[sequence]  # [N, h + GRID]
    # what stands for a missing token is one of the same sequence: another's could be infinite
    held = index.clamp(min=-chunks.history).minimum(count[sequence] - 1)
    taps = chunks.buffer_rows(sequence, held)
    index, held = index[:, chunks.history :], held[:, chunks.history :]
    rows = chunks.begin[sequence] + held.clamp(min=0)
    filled = (index >= 0) & (index < count[sequence])
    return CellBlock(
        taps=taps.to(device),
        rows=rows.to(device),
        filled=filled.to(device),
        sources=filled.flatten().nonzero().squeeze(1).to(device),
        targets=rows[filled].to(device),
        states=states,
        widths=widths,
    )


def _ranges(widths: list[int]) -> list[tuple[int, int]]:
    """Consecutive steps (first, last), of _CELLS cells together at most."""
    ranges, first = [], 0
    for step in range(1, len(widths) + 1):
        if step == len(widths) or sum(widths[first : step + 1]) > _CELLS:
            ranges.append((first, step))
            first = step
    return ranges


def _runs(slots: list[int]) -> list[tuple[int, int, int]]:
    runs: list[tuple[int, int, int]] = []
    for row, slot in enumerate(slots):
        start, first, last = runs[-1] if runs else (0, 0, 0)
        if runs and slot == start + last - first and last - first < _RUN:
            runs[-1] = (start, first, row + 1)
        else:
            runs.append((slot, row, row + 1))
    return runs
