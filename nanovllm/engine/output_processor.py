"""OutputProcessor: from sequence updates to text, stop strings, logprobs and RequestOutputs."""

from __future__ import annotations

import time

from nanovllm.engine.request import Request
from nanovllm.engine.scheduler import Chunk, StepUpdate
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanovllm.sample_row import TokenLogprobs
from nanovllm.tokenizer.detokenizer import Detokenizer
from nanovllm.tokenizer.stop import StopMatcher
from nanovllm.tokenizer.tokenizer import Tokenizer


class _Completion:
    """One sequence's output in the making."""

    def __init__(self, seq: Sequence, tokenizer: Tokenizer | None) -> None:
        params = seq.params
        self.params = params
        self.output = CompletionOutput(seq.index, "", [])
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0
        self._detokenizer = (
            Detokenizer(tokenizer, params.skip_special_tokens) if tokenizer is not None and params.detokenize else None
        )
        self._stop = StopMatcher(params.stop_strings, params.include_stop_str_in_output)

    def append(self, token_id: int, ended_by_token: bool) -> None:
        """Take a token; the text of one that ends the sequence is shown only on request."""
        output = self.output
        output.token_ids.append(token_id)
        if self._detokenizer is None or (ended_by_token and not self.params.include_stop_str_in_output):
            return
        text = self._detokenizer.append(token_id)
        if not self.params.stop or len(output.token_ids) <= self.params.min_tokens:  # or too early for any stop
            output.text += text
            return
        shown, stop = self._stop.push(text)
        output.text += shown
        if stop is not None:
            output.finish_reason, output.stop_reason = "stop", stop

    def finish(self, reason: str, stop_reason: str | int | None) -> None:
        """End it for another reason than a stop string: show what was held back."""
        if self._detokenizer is not None:
            shown, stop = self._stop.push(self._detokenizer.flush())
            self.output.text += shown + self._stop.flush()
            if stop is not None:
                reason, stop_reason = "stop", stop
        self.output.finish_reason, self.output.stop_reason = reason, stop_reason


class _RequestState:
    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request = request
        self.completions = [_Completion(seq, tokenizer) for seq in request.sequences]
        prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if request.params.prompt_logprobs is not None:
            prompt_logprobs = [None] * len(request.prompt_token_ids)
        self.output = RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[c.output for c in self.completions],
            finished=False,
            metrics=RequestMetrics(request.arrival_time),
            prompt_logprobs=prompt_logprobs,
        )

    def count(self) -> None:
        """Tokens from the prefix cache, and preemptions."""
        sequences = self.request.sequences
        self.output.num_cached_tokens = sequences[0].num_cached
        self.output.metrics.num_preemptions = sum(seq.num_preemptions for seq in sequences)


class OutputProcessor:
    """Owns the state of every unfinished request's output.

    A request has one RequestOutput, which later steps update in place. A token costs what has to be written
    down for it; what changes seldom is looked at when it may have changed.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._states: dict[str, _RequestState] = {}

    def add(self, request: Request) -> None:
        self._states[request.request_id] = _RequestState(request, self._tokenizer)

    def request(self, request_id: str) -> Request | None:
        """An unfinished request."""
        state = self._states.get(request_id)
        return None if state is None else state.request

    @property
    def request_ids(self) -> list[str]:
        """Of unfinished requests."""
        return list(self._states)

    def process(self, update: StepUpdate, step_start: float) -> tuple[list[RequestOutput], list[tuple[Sequence, str]]]:
        """Outputs of the requests that got something, and the running sequences that a stop
        string ended (with the string): those the scheduler still has to finish.
        """
        now = time.monotonic()
        touched: dict[str, RequestOutput] = {}
        stopped: list[tuple[Sequence, str]] = []
        for chunk in update.chunks:
            touched[chunk.seq.request_id] = self._book_chunk(chunk, step_start)
        for seq, token_id, logprobs in zip(update.sequences, update.token_ids, update.logprobs, strict=True):
            state = self._states[seq.request_id]
            output = touched[seq.request_id] = state.output
            completion, metrics = state.completions[seq.index], output.metrics
            metrics.last_token_time = now
            if metrics.first_token_time is None:
                metrics.first_token_time = now
            if logprobs is not None:
                self._book_logprobs(completion.output, logprobs)
            completion.append(token_id, ended_by_token=seq.finish_reason == "stop")
            if seq.finish_reason is not None:
                if completion.output.finish_reason is None:
                    completion.finish(seq.finish_reason, seq.stop_reason)
                self._settle(state, now)
            elif completion.output.finish_reason is not None:
                assert isinstance(completion.output.stop_reason, str)
                stopped.append((seq, completion.output.stop_reason))
                self._settle(state, now)
        return list(touched.values()), stopped

    def abort(self, request_id: str) -> RequestOutput:
        """End a request's unfinished completions."""
        state = self._states[request_id]
        for completion in state.completions:
            if not completion.output.finished:
                completion.finish("abort", None)
        self._settle(state, time.monotonic())
        return state.output

    def _book_chunk(self, chunk: Chunk, step_start: float) -> RequestOutput:
        state = self._states[chunk.seq.request_id]
        output = state.output
        if output.metrics.first_scheduled_time is None:
            output.metrics.first_scheduled_time = step_start
        if chunk.prompt_logprobs is not None:
            assert output.prompt_logprobs is not None
            for i, found in enumerate(chunk.prompt_logprobs, start=chunk.start + 1):
                output.prompt_logprobs[i] = self._logprob_dict(found)
        state.count()
        return output

    def _book_logprobs(self, output: CompletionOutput, found: TokenLogprobs) -> None:
        assert output.logprobs is not None and output.cumulative_logprob is not None
        output.logprobs.append(self._logprob_dict(found))
        output.cumulative_logprob += float(found.logprobs[0])

    def _settle(self, state: _RequestState, now: float) -> None:
        """One of its completions has ended."""
        output = state.output
        state.count()
        output.finished = all(completion.finished for completion in output.outputs)
        if output.finished:
            output.metrics.finished_time = now
            del self._states[output.request_id]

    def _logprob_dict(self, found: TokenLogprobs) -> dict[int, Logprob]:
        """The actual token first, with its own rank; then the likeliest, ranked from 1."""
        text = self._tokenizer.token_text if self._tokenizer is not None else lambda _: None
        ids, values = found.token_ids.tolist(), found.logprobs.tolist()
        result = {ids[0]: Logprob(values[0], found.rank, text(ids[0]))}
        for rank, (token_id, value) in enumerate(zip(ids[1:], values[1:], strict=True), start=1):
            result.setdefault(token_id, Logprob(value, rank, text(token_id)))
        return result
