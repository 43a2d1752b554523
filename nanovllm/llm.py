"""LLM: the offline API. Load a model, generate for many prompts, stream one, chat."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import Any, TypeVar, cast

from torch import nn
from tqdm import tqdm

from nanovllm.config import EngineConfig
from nanovllm.engine.build import build_engine
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.request import Prompt, Request
from nanovllm.errors import RequestError
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer.tokenizer import Message, Tokenizer

T = TypeVar("T")
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """An engine with a model, driven by the calling thread.

    Not thread-safe: one thread at a time. Several LLMs may live in one process. Close it, or
    use it in a `with` block, to release the model's memory.
    """

    def __init__(self, model: str, **options: Any) -> None:
        """model, options: see EngineConfig.

        Raises ConfigError, ModelNotFound, ModelNotSupported or WeightError.
        """
        self._engine: LLMEngine = build_engine(EngineConfig.from_options(model, options))
        self._streamed: dict[str, RequestOutput | None] = {}  # by request id

    @property
    def engine(self) -> LLMEngine:
        """The engine underneath, for those who drive it step by step."""
        return self._engine

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer; RequestError with skip_tokenizer_init=True."""
        if self._engine.tokenizer is None:
            raise RequestError("this engine has no tokenizer (skip_tokenizer_init=True)")
        return self._engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Of requests that bring none: by default what the checkpoint's authors recommend.

        See `generation_config` and `override_generation_config` in EngineConfig.
        """
        return SamplingParams(**self._engine.sampling_defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs in the order of the prompts.

        prompts: a string, a list of token ids, a PromptDict, or a list of these.
        sampling_params: one for all or one for each, taken as they are; default
            get_default_sampling_params().
        priority: one for each prompt, with scheduling_policy="priority"; lower runs first.
        Raises RequestError before anything runs if one of them is wrong.
        """
        many = _as_list(prompts)
        each = self._one_for_each(sampling_params, len(many))
        if priority is not None:
            if self._engine.config.scheduling_policy != "priority":
                raise RequestError("priority needs an LLM(..., scheduling_policy='priority')")
            if len(priority) != len(many):
                raise RequestError(f"{len(many)} prompts but {len(priority)} priorities")
        levels = priority or [0] * len(many)
        requests = [
            self._engine.prepare(prompt, params, priority=level)
            for prompt, params, level in zip(many, each, levels, strict=True)
        ]
        return self._run(requests, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's chat template.

        messages: a list of {"role": ..., "content": ...}, or a list of such lists.
        """
        if not messages:
            raise RequestError('messages must be a non-empty list of {"role": ..., "content": ...}')
        several = not isinstance(messages[0], dict)
        conversations = cast("Sequence[Sequence[Message]]", messages if several else [messages])
        prompts = [
            self.get_tokenizer().apply_chat_template(
                conversation,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=chat_template,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        each = self._one_for_each(sampling_params, len(prompts))
        requests = [self._prepare_rendered(cast(str, p), params) for p, params in zip(prompts, each, strict=True)]
        return self._run(requests, use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[str, None, RequestOutput]:
        """Yield the completion's text in pieces as they come; the generator's return value
        (`output = yield from llm.stream(...)`) is the finished RequestOutput.

        The request is queued by this call, so several streams that are read in turn run together, as
        the prompts of one `generate` do, and other calls may run between pieces. Closing or dropping
        the generator aborts the request.
        """
        params = sampling_params or self.get_default_sampling_params()
        if params.n != 1 or not params.detokenize:
            raise RequestError("stream yields the text of one completion: it needs n=1 and detokenize=True")
        self.get_tokenizer()
        stream = self._stream(self._engine.prepare(prompt, params))
        next(stream)  # up to where the request is queued: from there on, to close it is to abort
        return stream

    def apply_model(self, function: Callable[[nn.Module], T]) -> list[T]:
        """What `function` says of the model, on each rank: for looking, hooking and measuring."""
        return self._engine.apply_model(function)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; running requests are not touched."""
        self._engine.scheduler.cache.reset_prefix_cache()

    def close(self) -> None:
        """Release the model and its caches; harmless when repeated."""
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _one_for_each(self, params: Params, count: int) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        if len(params) != count:
            raise RequestError(f"{count} prompts but {len(params)} sampling_params; give one for all or one for each")
        return list(params)

    def _prepare_rendered(self, text: str, params: SamplingParams) -> Request:
        """A prompt whose special tokens the chat template has written already."""
        token_ids = self.get_tokenizer().encode(text, add_special_tokens=False)
        request = self._engine.prepare(token_ids, params)
        return request.with_text(text)

    def _stream(self, request: Request) -> Generator[str, None, RequestOutput]:
        """Yields once as soon as the request is queued, then the pieces of its text."""
        self._engine.add(request)
        self._streamed[request.request_id] = None
        shown = 0
        try:
            yield ""
            while True:
                output = self._streamed[request.request_id]
                if output is not None and len(output.outputs[0].text) > shown:
                    text = output.outputs[0].text
                    piece, shown = text[shown:], len(text)
                    yield piece  # other steps may go on meanwhile
                elif output is not None and output.finished:
                    return output
                else:
                    self._step()
        finally:
            del self._streamed[request.request_id]
            self._engine.abort(request.request_id)  # if it has not finished

    def _run(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        unfinished = {request.request_id for request in requests}
        finished: dict[str, RequestOutput] = {}
        bar = _ProgressBar(len(requests), self._engine, enabled=use_tqdm)
        try:
            for request in requests:
                self._engine.add(request)
            while unfinished:
                for output in self._step():
                    if output.finished and output.request_id in unfinished:
                        unfinished.discard(output.request_id)
                        finished[output.request_id] = output
                bar.update(len(finished))
        finally:
            bar.close()
            for request_id in unfinished:  # after an error or Ctrl-C
                self._engine.abort(request_id)
        return [finished[request.request_id] for request in requests]

    def _step(self) -> list[RequestOutput]:
        """One step of the engine; streams find their outputs, which are updated in place."""
        outputs = self._engine.step()
        for output in outputs:
            if output.request_id in self._streamed:
                self._streamed[output.request_id] = output
        return outputs


class _ProgressBar:
    """Requests done, and tokens a second of prompts and of output."""

    def __init__(self, total: int, engine: LLMEngine, enabled: bool) -> None:
        self._bar = tqdm(total=total, desc="Generating", unit="req", dynamic_ncols=True, disable=not enabled)
        self._stats = engine.stats
        self._start = time.perf_counter()
        self._prompt, self._output = self._stats.prompt_tokens, self._stats.generation_tokens

    def update(self, done: int) -> None:
        if self._bar.disable:
            return
        seconds = time.perf_counter() - self._start
        prefill = (self._stats.prompt_tokens - self._prompt) / seconds
        decode = (self._stats.generation_tokens - self._output) / seconds
        self._bar.set_postfix_str(f"prefill {prefill:.0f} tok/s, decode {decode:.0f} tok/s", refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts; a list of integers is one prompt."""
    if isinstance(prompts, (str, dict)):
        return [cast(Prompt, prompts)]
    if prompts and all(isinstance(p, int) for p in prompts):
        return [cast("list[int]", list(prompts))]
    return cast("list[Prompt]", list(prompts))
