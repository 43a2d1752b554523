"""Decoding steps as CUDA graphs: captured once for each of a few padded sizes, then replayed."""

from __future__ import annotations

import bisect
import dataclasses
import logging
import time
from collections.abc import Callable

import torch

from nanovllm.attention.base import AttentionBackend
from nanovllm.batch import Batch
from nanovllm.engine.runner.decode_batch import DeviceDecodeBatch, decodes
from nanovllm.engine.runner.memory import says_what_helps
from nanovllm.engine.step import StepPlan
from nanovllm.ops.graph import CannotRecord, Graph, Recorder

logger = logging.getLogger(__name__)

_STEP = 8  # between sizes that are not powers of two


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of sequences for which there may be a graph: 1, 2, 4, every eighth, and the largest."""
    return sorted({1, 2, 4, *range(_STEP, max_num_seqs, _STEP), max_num_seqs} - set(range(max_num_seqs + 1, _STEP)))


def early_sizes(sizes: list[int]) -> list[int]:
    """Those that are captured before anybody asks, largest first: their memory then serves the smaller ones."""
    return [size for size in reversed(sizes) if size & (size - 1) == 0 or size == sizes[-1]]


class CUDARecorder:
    """Captures what runs on the current stream. All graphs share one pool of memory, as no two run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    @says_what_helps(
        "no memory left to capture decoding steps as CUDA graphs: lower max_num_seqs, lower "
        "gpu_memory_utilization where the caches have left too little, or set enforce_eager=True"
    )
    def record(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Graph]:
        """`run` is run once before it is captured, so that kernels are compiled and libraries have their workspaces:
        it must be harmless with what its input tensors hold now. ConfigError if memory does not suffice."""
        current, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                out = run()
        except RuntimeError as error:  # of several kinds, CUDA's own among them
            raise CannotRecord(str(error).splitlines()[0]) from error
        return out, graph


class DecodeGraphs:
    """Steps in which every sequence computes one token and samples the next.

    forward: from a batch to the logits of its `logits_rows`; must not wait for the device. A step is padded to
    the next size, with rows that write to page 0 and slot 0.
    """

    def __init__(
        self,
        forward: Callable[[Batch], torch.Tensor],
        recorder: Recorder,
        decoding: DeviceDecodeBatch,
        backend: AttentionBackend,
    ) -> None:
        self._forward, self._recorder, self._decoding, self._backend = forward, recorder, decoding, backend
        self._sizes = graph_sizes(decoding.max_num_seqs)
        self._kept: dict[int, Graph] = {}
        self._logits = torch.empty(0)  # of all graphs

    def capture_early(self) -> None:
        """Capture the usual sizes now; the others when they are first asked for. CannotRecord if the model does
        what a graph cannot hold."""
        start, sizes = time.perf_counter(), early_sizes(self._sizes)
        for size in sizes:
            self._capture(size)
        logger.info("captured decoding steps of %s sequences in %.1f s", sizes, time.perf_counter() - start)

    def takes(self, plan: StepPlan) -> bool:
        return decodes(plan)

    def logits(self, plan: StepPlan) -> torch.Tensor:
        """fp32 [R, vocabulary], to be used before the next step overwrites it."""
        count = len(plan.sequences)
        size = self._sizes[bisect.bisect_left(self._sizes, count)]
        if size not in self._kept:
            self._capture(size)
        self._decoding.write(plan.sequences, size)
        self._kept[size].replay()
        return self._logits[:count]

    def _capture(self, size: int) -> None:
        self._decoding.write([], size)  # what is run to be captured must change no page and no state

        def run() -> torch.Tensor:
            batch = self._decoding.view(size)
            prepared = self._backend.prepare(batch, self._decoding.block_size)
            logits = self._forward(dataclasses.replace(batch, attention=prepared))
            if len(self._logits) < size:  # the largest comes first
                self._logits = logits.new_empty(self._decoding.max_num_seqs, logits.shape[1])
            return self._logits[:size].copy_(logits)

        _, self._kept[size] = self._recorder.record(run)
