"""The whole engine, driven by random operations, against the loop without a cache."""

from helpers import EOS, mock_engine, naive_generate
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nanovllm import SamplingParams

# few tokens and few lengths: prefixes meet often
PROMPTS = st.integers(1, 60).map(lambda n: [0] * n) | st.lists(st.integers(0, 2), min_size=1, max_size=60)


class EngineMachine(RuleBasedStateMachine):
    """Adds, steps, aborts, interrupts and resets in any order; every output must be the oracle's."""

    @initialize(
        num_blocks=st.integers(9, 24),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(6, 40),
        caching=st.booleans(),
        num_slots=st.sampled_from([0, 0, 1, 2, 3, 5, 12]),
        chunk_grid=st.sampled_from([1, 8]),
        window=st.sampled_from([None, None, 1, 5, 9, 16, 30]),
        policy=st.sampled_from(["fcfs", "priority"]),
        ahead=st.booleans(),
    )
    def start(self, num_blocks, max_num_seqs, budget, caching, num_slots, chunk_grid, window, policy, ahead):
        self.engine, self.executor = mock_engine(
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            enable_prefix_caching=caching,
            num_slots=num_slots + 1 if num_slots else 0,
            chunk_grid=chunk_grid,
            window=window,
            scheduling_policy=policy,
            async_scheduling=ahead,
        )
        self.unfinished = {}
        self.finished = {}

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(1, 30),
        n=st.integers(1, 3),
        seed=st.integers(0, 3),
        ignore_eos=st.booleans(),
        priority=st.integers(-1, 1),
        salt=st.sampled_from([None, None, "a"]),
    )
    def add(self, prompt, max_tokens, n, seed, ignore_eos, priority, salt):
        params = SamplingParams(n=n, max_tokens=max_tokens, seed=seed, ignore_eos=ignore_eos)
        options = {"prompt_token_ids": prompt} | ({} if salt is None else {"cache_salt": salt})
        request = self.engine.prepare(options, params, priority=priority)
        self.engine.add(request)
        self.unfinished[request.request_id] = request

    @precondition(lambda self: self.unfinished)
    @rule(count=st.integers(1, 8))
    def step(self, count):
        for _ in range(count):
            if self.engine.has_unfinished:
                self.take(self.engine.step())
                self.engine.scheduler.check_invariants()

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.unfinished)))
        self.take([self.engine.abort(request_id)])

    @precondition(lambda self: self.unfinished)
    @rule()
    def interrupt_a_step(self):
        planned = len(self.executor.plans)
        self.executor.fail_next = RuntimeError("interrupted")
        try:
            self.take(self.engine.step())
        except RuntimeError:
            return
        self.executor.fail_next = None
        assert len(self.executor.plans) == planned, "the executor's error was swallowed"

    @rule()
    def reset_prefix_cache(self):
        self.engine.scheduler.cache.reset_prefix_cache()

    @invariant()
    def consistent(self):
        if hasattr(self, "engine"):
            self.engine.scheduler.check_invariants()

    def take(self, outputs):
        for output in outputs:
            if output.finished:
                request = self.unfinished.pop(output.request_id)
                self.compare(request, output)

    def compare(self, request, output):
        assert output.prompt_token_ids == request.prompt_token_ids
        assert [c.index for c in output.outputs] == list(range(request.params.n))
        for completion in output.outputs:
            expected = naive_generate(
                request.prompt_token_ids,
                request.params.max_tokens,
                seed=request.params.seed + completion.index,
                eos=None if request.params.ignore_eos else EOS,
                limit=self.engine.config.max_model_len,
            )
            if completion.finish_reason == "abort":
                assert completion.token_ids == expected[: len(completion.token_ids)]
            else:
                assert completion.token_ids == expected

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for _ in range(5000):
            if not self.engine.has_unfinished:
                break
            self.take(self.engine.step())
        assert not self.unfinished, "requests were forgotten or starve"
        blocks = self.engine.scheduler.cache.blocks
        assert blocks.num_free == blocks.num_usable, "pages leak"


EngineMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestEngine = EngineMachine.TestCase
