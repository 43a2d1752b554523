"""Lines of a batch file in, lines of its output out, through one engine that is kept full."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, TypeVar

import xxhash

from nanovllm.cli.batch_input import Work, read_lines
from nanovllm.config import EngineConfig
from nanovllm.engine.request import PromptDict, Request
from nanovllm.errors import RequestError
from nanovllm.llm import LLM
from nanovllm.openai.batch_lines import BatchLine, answer_line, error_line, read_line
from nanovllm.openai.errors import api_error
from nanovllm.openai.requests import ChatRequest, CompletionRequest, check_model
from nanovllm.openai.responses import response_body
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Server:
    """What answers. options: the engine's. served: the model's names, of which responses have the first.
    chat_template: not the model's own."""

    model: str
    options: Mapping[str, Any]
    served: Sequence[str]
    chat_template: str | None = None

    @property
    def config(self) -> EngineConfig:
        """ConfigError for an option that is wrong."""
        return EngineConfig.from_options(self.model, dict(self.options))

    @property
    def ahead(self) -> int:
        """Sequences that run and wait: whoever finishes is replaced in the next step."""
        return 2 * self.config.max_num_seqs


@dataclass(frozen=True, slots=True)
class Answer:
    """line: of the output file. tokens: that were generated."""

    line: bytes
    failed: bool
    tokens: int


@dataclass(slots=True)
class _Running(Generic[K]):
    key: K
    custom_id: str
    asked: ChatRequest | CompletionRequest
    requests: list[Request]
    finished: dict[str, RequestOutput] = field(default_factory=dict)


class BatchEngine(Generic[K]):
    """Every line that is added comes out of some `step`, under the caller's key, as an answer or an error.

    What is drawn depends on nothing but the line: a request without a seed has one by its custom_id and the
    engine's seed, unless that is None.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._llm = LLM(server.model, **server.options)
        self._ahead = server.ahead
        self._running: dict[str, _Running[K]] = {}  # by the ids of their requests
        self._refused: list[tuple[K, Answer]] = []
        self._sequences = 0

    def __enter__(self) -> BatchEngine[K]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._llm.close()

    @property
    def busy(self) -> bool:
        return bool(self._running or self._refused)

    @property
    def has_room(self) -> bool:
        return self._sequences + len(self._refused) < self._ahead

    def add(self, key: K, text: bytes) -> None:
        """text: a line that has a custom_id."""
        line = read_line(text)
        try:
            asked = line.request()
            check_model(asked, self._server.served)
            requests = self._prepare(line, asked)
        except RequestError as error:
            found = api_error(error, line.values.get("body", {}))
            self._refused.append((key, Answer(error_line(line.custom_id, found), failed=True, tokens=0)))
            return
        running = _Running(key, line.custom_id, asked, requests)
        for request in requests:
            self._llm.engine.add(request)
            self._running[request.request_id] = running
            self._sequences += len(request.sequences)

    def step(self) -> list[tuple[K, Answer]]:
        """The lines that are done, after one step of the engine if anything runs."""
        done, self._refused = self._refused, []
        for output in self._llm.engine.step() if self._running else ():
            if not output.finished:
                continue
            running = self._running.pop(output.request_id)
            running.finished[output.request_id] = output
            self._sequences -= len(output.outputs)
            if len(running.finished) == len(running.requests):
                done.append((running.key, self._answer(running)))
        return done

    def _prepare(self, line: BatchLine, asked: ChatRequest | CompletionRequest) -> list[Request]:
        engine = self._llm.engine
        params = asked.params(engine.sampling_defaults)
        requests = []
        for i, prompt in enumerate(asked.prompts(self._llm.get_tokenizer(), self._server.chat_template)):
            full: PromptDict = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
            if asked.cache_salt is not None:
                full["cache_salt"] = asked.cache_salt
            requests.append(engine.prepare(full, self._seeded(params, f"{line.custom_id} {i}")))
        return requests

    def _seeded(self, params: SamplingParams, name: str) -> SamplingParams:
        seed = self._llm.engine.config.seed
        if params.seed is not None or seed is None:
            return params
        own = xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"), seed) >> 1
        return dataclasses.replace(params, seed=own)

    def _answer(self, running: _Running[K]) -> Answer:
        outputs = [running.finished[request.request_id] for request in running.requests]
        body = response_body(running.asked, outputs, self._llm.get_tokenizer(), self._server.served[0])
        return Answer(answer_line(running.custom_id, body), False, body["usage"]["completion_tokens"])


def answer_here(server: Server, work: Work) -> Iterator[tuple[int, Answer]]:
    """(place, answer), in the order in which they are done; lines are read as there is room for them."""
    with BatchEngine[int](server) as engine:
        for place, line in read_lines(work.file, work.asked):
            engine.add(place, line)
            while not engine.has_room:
                yield from engine.step()
        while engine.busy:
            yield from engine.step()
