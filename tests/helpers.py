"""A model without tensors, a tokenizer of bytes, and the loop that any engine must agree with."""

from __future__ import annotations

import copy
import dataclasses
import time
import zlib
from concurrent.futures import Future

import numpy as np
import pytest
import tokenizers

from nanovllm.cache_spec import CachePlan
from nanovllm.config import EngineConfig
from nanovllm.engine.build import fit_model_len
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.step import StepPlan, StepResult, fill_in
from nanovllm.ops.library import Library, library_or_reason
from nanovllm.ops.native_sampling import NativeSampling
from nanovllm.ops.torch_sampling import TorchSampling
from nanovllm.outputs import RequestOutput
from nanovllm.sample_row import TokenLogprobs
from nanovllm.tokenizer.tokenizer import _BYTE_LEVEL, Tokenizer

VOCAB = 258  # the bytes, a beginning and an end
BOS, EOS = 256, 257


def byte_tokenizer(chat_template: str | None = None) -> Tokenizer:
    """Token id = byte value; <s> and </s> beyond."""
    vocab = dict(_BYTE_LEVEL)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, bos_token="<s>", eos_token="</s>", chat_template=chat_template)


def sampling_makers() -> list:
    """As parameters of a fixture; Triton's, which would take many minutes interpreted, have tests of their own."""
    found = [pytest.param(TorchSampling(), id="torch")]
    if isinstance(library := library_or_reason(), Library):
        found.append(pytest.param(NativeSampling(library), id="native"))
    return found


def next_token(token_ids: list[int], seed: int = 0, vocab: int = VOCAB) -> int:
    """The mock model: any change of any token in the history changes what follows."""
    return zlib.crc32(np.array([*token_ids, seed % 2**31], dtype=np.int64).tobytes()) % vocab


def naive_generate(
    prompt: list[int], max_tokens: int, *, seed: int = 0, eos: int | None = EOS, vocab: int = VOCAB, limit: int = 10**9
) -> list[int]:
    """What an engine has to give, one token after the other, without any cache."""
    output: list[int] = []
    while len(output) < max_tokens and len(prompt) + len(output) < limit:
        output.append(next_token(prompt + output, seed, vocab))
        if output[-1] == eos:
            break
    return output


class MockExecutor:
    """Keeps tokens in pages as a real model keeps keys and values: it writes what it is told to
    compute, then reads each sequence back through its block table, as far as the window. With state
    slots, a slot holds the tokens that the sequence has seen. A stale, lost or shared page or slot
    is noticed or gives another token. `script` overrides the model: output index -> token id."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        vocab: int = VOCAB,
        num_slots: int = 0,
        state_grid: int = 8,
        chunk_grid: int = 8,
        snapshot_interval: int = 24,
        window: int | None = None,
        script=None,
    ):
        self.pages = np.full((num_blocks, block_size), -1, dtype=np.int64)
        self.states: list[list[int]] = [[-1] for _ in range(num_slots)]
        self.block_size, self.vocab, self.script, self.window = block_size, vocab, script, window
        self.capacity = CachePlan(num_blocks, num_slots, 0, window, state_grid, chunk_grid, snapshot_interval)
        self.plans: list[StepPlan] = []
        self.sampled = np.empty(0, dtype=np.int64)  # in the last step
        self.fail_next: BaseException | None = None
        self.closed = False

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        assert plan.sequences, "an empty step was submitted"
        self.plans.append(copied(plan))
        fill_in(plan, self.sampled)
        flat = self.pages.reshape(-1)
        self.begin_states(plan)
        for i, s in enumerate(plan.sequences):
            if self.fail_next is not None and i == len(plan.sequences) // 2:
                error, self.fail_next = self.fail_next, None
                raise error  # half of the pages are written
            for position, token_id in enumerate(s.token_ids.tolist(), start=s.start):
                block, offset = s.block_table[position // self.block_size], position % self.block_size
                assert block != 0, "page 0 is the sink"
                flat[block * self.block_size + offset] = token_id
        tokens, logprobs, prompt_logprobs = [], [], {}
        for s in plan.sequences:
            seen = self.seen(s)
            if s.prompt_targets is not None:
                prompt_logprobs[s.seq_id] = [
                    TokenLogprobs(np.array([t, 7]), np.array([-1.0, -0.5], np.float32), 2) for t in s.prompt_targets
                ]
            if s.sample is None:
                continue
            row = s.sample
            history = [*row.prompt.tolist(), *row.output.tolist()]
            assert seen == history[-len(seen) :], "the pages hold other tokens"
            assert not self.states or self.states[s.state_slot] == history, "the state saw other tokens"
            seen = history
            token = self.script[row.index] if self.script else next_token(seen, row.seed, self.vocab)
            tokens.append(token)
            wants = row.params.logprobs is not None
            logprobs.append(TokenLogprobs(np.array([token]), np.array([-0.25], np.float32), 1) if wants else None)
        for s in plan.sequences:
            if s.capture_to:
                self.states[s.capture_to] = list(self.states[s.state_slot])
        self.sampled = np.array(tokens, dtype=np.int64)
        future: Future[StepResult] = Future()
        future.set_result(StepResult(self.sampled, logprobs, prompt_logprobs))
        return future

    def begin_states(self, plan: StepPlan) -> None:
        if not self.states:
            assert not any(s.state_slot or s.resume_from or s.capture_to for s in plan.sequences)
            return
        slots = [s.state_slot for s in plan.sequences] + [s.capture_to for s in plan.sequences if s.capture_to]
        assert 0 not in slots and len(set(slots)) == len(slots), "a slot is used twice"
        for s in plan.sequences:
            if s.resume_from:
                self.states[s.state_slot] = list(self.states[s.resume_from])
        for s in plan.sequences:
            if s.start == 0:
                self.states[s.state_slot] = []
            assert len(self.states[s.state_slot]) == s.start, "the state is another prefix's"
            self.states[s.state_slot] = self.states[s.state_slot] + s.token_ids.tolist()

    def seen(self, s) -> list[int]:
        """The tokens that the last one of the step sees."""
        end = s.start + s.num_tokens
        first = 0 if self.window is None else max(0, end - self.window)
        pages = s.block_table[first // self.block_size :]
        assert 0 not in pages, "a page within the window was given back"
        return self.pages[pages].reshape(-1)[first % self.block_size :][: end - first].tolist()

    def close(self) -> None:
        self.closed = True


def copied(plan: StepPlan) -> StepPlan:
    """What it says now, as the next plan moves its parts on."""
    return StepPlan([dataclasses.replace(s, sample=copy.copy(s.sample)) for s in plan.sequences])


def mock_engine(
    *,
    num_blocks: int = 64,
    block_size: int = 8,
    script=None,
    num_slots: int = 0,
    chunk_grid: int = 8,
    window: int | None = None,
    tokenizer=None,
    eos=(EOS,),
    **options,
) -> tuple[LLMEngine, MockExecutor]:
    config = EngineConfig.from_options("mock", {"kvcache_block_size": block_size, **options})
    config = config.resolve(checkpoint_dtype="float32", max_positions=4096, cuda=False)
    executor = MockExecutor(
        num_blocks, block_size, script=script, num_slots=num_slots, chunk_grid=chunk_grid, window=window
    )
    config = fit_model_len(config, executor.capacity, options.get("max_model_len"))
    engine = LLMEngine(config, tokenizer or byte_tokenizer(), executor, vocab_size=VOCAB, eos_ids=list(eos))
    return engine, executor


def run_all(engine: LLMEngine, max_steps: int = 10_000) -> dict[str, RequestOutput]:
    """Step to the end; the finished outputs by request."""
    finished = {}
    for _ in range(max_steps):
        if not engine.has_unfinished:
            return finished
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
    raise AssertionError("the engine does not come to an end")


def wait_until(true, seconds=10):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
