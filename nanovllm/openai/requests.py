"""The bodies of /v1/chat/completions and /v1/completions, by OpenAI's and vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from nanovllm.openai.errors import APIError
from nanovllm.openai.fields import Fields
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer.tokenizer import Message, Tokenizer

_COMPLETION_TOKENS = 16  # OpenAI's default
# what the template's variables cannot be called
_TAKEN = (
    "self",
    "messages",
    "template",
    "tokenize",
    "add_generation_prompt",
    "chat_template",
    "bos_token",
    "eos_token",
)


@dataclass(frozen=True, slots=True)
class APIRequest:
    """sampling: arguments for SamplingParams, as far as they are given. return_token_ids: vLLM's; the
    response holds them too."""

    model: str | None
    sampling: Mapping[str, Any]
    cache_salt: str | None
    return_token_ids: bool


@dataclass(frozen=True, slots=True)
class ChatRequest(APIRequest):
    """template: what the chat template gets beside the messages, whose contents are strings."""

    messages: Sequence[Message]
    template: Mapping[str, Any]

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> ChatRequest:
        """APIError for a field that is wrong or not known."""
        fields = Fields(body)
        messages = fields.take("messages", list)
        if not messages:
            raise APIError('messages must be a non-empty list of {"role": ..., "content": ...}', "messages")
        sampling = fields.sampling()
        most = fields.take("max_completion_tokens", int)
        if most is not None:
            sampling["max_tokens"] = most
        top = fields.take("top_logprobs", int)
        if fields.take("logprobs", bool):
            sampling["logprobs"] = top or 0
        elif top:
            raise APIError("top_logprobs needs logprobs=true", "top_logprobs")
        request = cls(
            *_common(fields, sampling),
            messages=[_message(message, f"messages[{i}]") for i, message in enumerate(messages)],
            template=_template(fields),
        )
        fields.end()
        return request

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """defaults: arguments for what is not given. RequestError if a value is out of range."""
        return SamplingParams(**{"max_tokens": None, **defaults, **self.sampling})

    def prompts(self, tokenizer: Tokenizer, chat_template: str | None = None) -> list[list[int]]:
        """Token ids. chat_template: not the model's own."""
        variables = {"add_generation_prompt": True, **self.template}
        ids = tokenizer.apply_chat_template(self.messages, chat_template=chat_template, **variables)
        return [cast("list[int]", ids)]


@dataclass(frozen=True, slots=True)
class CompletionRequest(APIRequest):
    """given: prompts, of which each has its n choices."""

    given: list[str | list[int]]

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> CompletionRequest:
        """APIError for a field that is wrong or not known."""
        fields = Fields({name: value for name, value in body.items() if name != "prompt"})
        sampling = fields.sampling()
        logprobs = fields.take("logprobs", int)
        if logprobs is not None:
            sampling["logprobs"] = logprobs
        request = cls(*_common(fields, sampling), given=_prompts(body.get("prompt")))
        fields.end()
        return request

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """defaults: arguments for what is not given. RequestError if a value is out of range."""
        return SamplingParams(**{**defaults, "max_tokens": _COMPLETION_TOKENS, **self.sampling})

    def prompts(self, tokenizer: Tokenizer, chat_template: str | None = None) -> list[str | list[int]]:
        return self.given


_ENDPOINTS: dict[str, type[ChatRequest] | type[CompletionRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}


def read_request(url: str, body: Mapping[str, Any]) -> ChatRequest | CompletionRequest:
    """APIError for an address that is not served, and for a field that is wrong, not known or not supported."""
    if url not in _ENDPOINTS:
        raise APIError(f"url={url!r} is not one of {', '.join(_ENDPOINTS)}", "url", status=404)
    return _ENDPOINTS[url].from_body(body)


def check_model(request: APIRequest, served: Sequence[str]) -> None:
    """APIError if the request is for another model."""
    if request.model is not None and request.model not in served:
        message = f"the model {request.model!r} does not exist here; there is {', '.join(map(repr, served))}"
        raise APIError(message, "model", status=404, code="model_not_found")


def _common(fields: Fields, sampling: dict[str, Any]) -> tuple[str | None, dict[str, Any], str | None, bool]:
    salt = fields.take("cache_salt", str)
    if salt == "":
        raise APIError("cache_salt is empty; leave it out", "cache_salt")
    return fields.take("model", str), sampling, salt, bool(fields.take("return_token_ids", bool))


def _template(fields: Fields) -> dict[str, Any]:
    given = fields.take("chat_template_kwargs", dict) or {}
    for name in given:
        if name in _TAKEN:
            raise APIError(f"chat_template_kwargs: {name!r} cannot be set there", "chat_template_kwargs")
    own = {
        "add_generation_prompt": fields.take("add_generation_prompt", bool),
        "documents": fields.take("documents", list),
    }
    return {**given, **{name: value for name, value in own.items() if value is not None}}


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise APIError(f'{place} must be an object such as {{"role": "user", "content": "..."}}', "messages")
    for name, value in message.items():
        if name not in ("role", "content", "name") and value:
            raise APIError(f"{place}.{name} is not supported; leave it out", "messages")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{place}.content[{i}]") for i, part in enumerate(content))  # as in vLLM
    if not isinstance(content, str):
        raise APIError(f"{place}.content must be a string or a list of parts, got {type(content).__name__}", "messages")
    return {"role": message["role"], "content": content, **({"name": message["name"]} if message.get("name") else {})}


def _part(part: Any, place: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise APIError(f'{place}: only {{"type": "text", "text": "..."}} is supported', "messages")
    return part["text"]


def _prompts(prompt: Any) -> list[str | list[int]]:
    """One prompt, or each of a list of them."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, int) for item in prompt):
            return [prompt]
        if all(isinstance(item, str) for item in prompt) or all(isinstance(item, list) for item in prompt):
            return prompt
    raise APIError("prompt must be a string, a list of token ids, or a non-empty list of one of these", "prompt")
