"""What a request gets back: vLLM's shapes, indexable as nano-vllm's dict."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's natural-log probability, its rank (1 is the likeliest) and its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Seconds on `time.monotonic`'s clock; None where the request has not come so far."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt.

    finish_reason: None while running, else "stop", "length" or "abort".
    stop_reason: the stop string or stop token id that ended it; None for end-of-sequence.
    logprobs: one {token id: Logprob} a token, when asked for; cumulative_logprob their sum.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request's state after a step; final once `finished`.

    `out["text"]` and `out["token_ids"]` read the first completion, as nano-vllm's dict does.
    num_cached_tokens: prompt tokens served from the prefix cache.
    prompt_logprobs: one entry a prompt token, the first of them None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = field(default=0)

    def __getitem__(self, key: str) -> str | list[int]:
        if key == "text":
            return self.outputs[0].text
        if key == "token_ids":
            return self.outputs[0].token_ids
        raise KeyError(f"{key!r}: a RequestOutput is indexed by 'text' or 'token_ids'")
