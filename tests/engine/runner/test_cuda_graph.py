"""Steps that decode, padded and replayed; a GPU's recorder is replaced by one that runs everything again."""

import contextlib
import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine.runner.cuda_graph import CUDARecorder, DecodeGraphs, early_sizes, graph_sizes
from nanovllm.engine.runner.decode_batch import DeviceDecodeBatch
from nanovllm.engine.runner.largest_step import largest_step
from nanovllm.engine.step import PlannedSequence
from nanovllm.errors import ConfigError
from nanovllm.ops.graph import CannotRecord
from nanovllm.sample_row import SampleRow
from nanovllm.transfer import pack, packed_bytes, unpack

OPTIONS = {"device": "cpu", "kernels": "torch", "attention_backend": "reference", "skip_tokenizer_init": True}


class Again:
    """A graph that runs what it holds."""

    def __init__(self, run):
        self.replay = run


class RunsAgain:
    def __init__(self):
        self.recorded = 0

    def record(self, run):
        self.recorded += 1
        return run(), Again(run)


def test_sizes_cover_every_number_of_sequences():
    for largest in range(1, 300):
        sizes = graph_sizes(largest)
        assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == largest
        assert all(larger - smaller <= max(4, smaller) for smaller, larger in itertools.pairwise(sizes))
        early = early_sizes(sizes)
        assert early[0] == largest and set(early) <= set(sizes) and len(early) <= 11


def test_one_copy_carries_arrays_of_all_kinds():
    arrays = [np.arange(5), np.zeros(0, np.int64), np.arange(6, dtype=np.int32).reshape(2, 3).T, np.array([7])]
    packed = np.full(packed_bytes(arrays), 255, dtype=np.uint8)
    pack(arrays, packed)
    found = unpack(torch.from_numpy(packed), arrays)
    for array, tensor in zip(arrays, found, strict=True):
        assert torch.equal(tensor, torch.from_numpy(array.copy()))
        assert tensor.numpy().dtype == array.dtype


def sequence(seq_id, start, pages, follows=-1, slot=0):
    row = SampleRow(SamplingParams(), 0, 0, np.zeros(1, np.int32), np.zeros(1, np.int32))
    table = np.array(pages, np.int32)
    return PlannedSequence(seq_id, np.array([40 + seq_id], np.int32), start, table, slot, row, follows=follows)


def test_rows_are_padded_with_what_harms_nobody():
    sampled = torch.tensor([90, 91, 92, 93])
    decoding = DeviceDecodeBatch(sampled, max_num_seqs=4, max_pages=3, block_size=8)
    decoding.write([sequence(0, 20, [5, 6, 7], slot=3), sequence(1, 3, [2]), sequence(2, 9, [8, 9], follows=1)], 4)
    decoding.write([sequence(1, 9, [2, 4], follows=2, slot=1)], 2)
    batch = decoding.view(2)
    assert batch.input_ids.tolist() == [92, 0]
    assert batch.positions.tolist() == [9, 0]
    assert batch.seq_lens.tolist() == [10, 1]
    assert batch.slot_mapping.tolist() == [4 * 8 + 1, 0]
    assert batch.block_tables[0, :2].tolist() == [2, 4] and batch.block_tables[1, 0] == 0
    assert batch.state_slots.tolist() == [1, 0]
    assert batch.query_start.tolist() == [0, 1, 2] and batch.logits_rows.tolist() == [0, 1]
    assert batch.max_seq_len == 24


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite-hybrid"])
def test_texts_are_those_of_plain_steps(tiny_model, family):
    params = [SamplingParams(seed=i, max_tokens=3 + 5 * i, repetition_penalty=1 + i % 2) for i in range(5)]
    prompts = [[7 + i] * (1 + 9 * i) for i in range(5)]
    texts = []
    for graphs in (False, True):
        with LLM(str(tiny_model(family)), **OPTIONS, max_num_seqs=5, kvcache_memory="8MiB") as llm:
            if graphs:
                recorder = on_a_device(llm)
            texts.append([o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)])
    assert texts[0] == texts[1]
    assert recorder.recorded == 4  # 5, 4, 2 and 1


def on_a_device(llm):
    """Let the engine do what it does on a GPU: plan ahead, look tokens up on the device, replay padded steps."""
    runner, recorder = llm.engine._executor._runner, RunsAgain()
    decoding = DeviceDecodeBatch(runner._sampled, max_num_seqs=len(runner._sampled), max_pages=64, block_size=16)

    def forward(batch):
        return runner._sampled_logits(runner._model(batch), batch)

    runner._looks_up = True
    runner._graphs = DecodeGraphs(forward, recorder, decoding, runner._backend)
    with torch.inference_mode():
        runner._graphs.capture_early()
    llm.engine._ahead = 1
    return recorder


def test_a_model_that_no_graph_holds_runs_op_by_op(tiny_model, monkeypatch):
    prompts, params = [[5, 6, 7]], SamplingParams(temperature=0, max_tokens=8)
    with LLM(str(tiny_model("llama")), **OPTIONS, max_num_seqs=5, kvcache_memory="8MiB") as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)[0].outputs[0].token_ids
        recorder = on_a_device(llm)

        def refuse(run):
            raise CannotRecord("a synchronisation")

        recorder.record = refuse
        llm.engine._executor._runner._graphs._kept.clear()
        assert llm.generate(prompts, params, use_tqdm=False)[0].outputs[0].token_ids == expected
        assert llm.engine._executor._runner._graphs is None


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda without a GPU: a capture runs what it is given, and `end` behind it."""
    found = SimpleNamespace(end=lambda: None)

    @contextlib.contextmanager
    def graph(*_, **__):
        try:
            yield
        finally:
            found.end()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("graph_pool_handle", "CUDAGraph", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return found


@pytest.mark.parametrize("fails", [1, 2], ids=["before the capture", "in it"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["allocator", "driver", "cuBLAS"],
)
def test_too_little_memory_for_a_graph_names_what_to_change(cuda, error, fails):
    """Steps ran op by op, and slower, where fewer sequences or smaller caches would have left room for graphs."""
    calls = itertools.count(1)

    def run():
        if next(calls) == fails:
            raise error
        return torch.zeros(1)

    with pytest.raises(ConfigError, match=r"max_num_seqs.*gpu_memory_utilization.*enforce_eager"):
        CUDARecorder(torch.device("cuda")).record(run)


def test_the_first_error_of_a_capture_is_what_counts(cuda):
    """CUDA complains at the end of a capture that has failed before."""
    calls = itertools.count(1)

    def end():
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def run(error):
        if next(calls) % 2 == 0:
            raise error
        return torch.zeros(1)

    cuda.end = end
    with pytest.raises(ConfigError, match="no memory"):
        CUDARecorder(torch.device("cuda")).record(lambda: run(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(CannotRecord, match="previous error"):
        CUDARecorder(torch.device("cuda")).record(lambda: run(RuntimeError("CUDA error: not permitted when capturing")))


def test_the_largest_step_uses_the_budget_and_harms_nobody(tiny_model):
    """It runs before there are pages: all it needs is page 0 and slot 0."""
    for family in ("llama", "granite-hybrid"):
        with LLM(str(tiny_model(family)), **OPTIONS, max_num_seqs=5, max_model_len=50, kvcache_memory="8MiB") as llm:
            plan = largest_step(dataclasses.replace(llm.engine.config, max_num_batched_tokens=64))
            assert plan.num_tokens == 60 and len(plan.sequences) == 5
            runner = llm.engine._executor._runner
            before = [kv[1:].clone() for kv in runner._states]
            result = runner.execute(plan).result()
            assert len(result.token_ids) == 5
            assert all(torch.equal(a, b[1:]) for a, b in zip(before, runner._states, strict=True))
