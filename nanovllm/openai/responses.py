"""From finished outputs to the bodies of responses: OpenAI's objects, with what vLLM adds to them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from nanovllm.openai.requests import APIRequest, ChatRequest, CompletionRequest
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm.tokenizer.tokenizer import Tokenizer

_LEAST = -9999.0  # JSON has no infinity; OpenAI's number for it


def response_body(
    request: ChatRequest | CompletionRequest, outputs: Sequence[RequestOutput], tokenizer: Tokenizer, model: str
) -> dict[str, Any]:
    """outputs: finished, one for each prompt. model: the name that it is served by."""
    if isinstance(request, ChatRequest):
        return chat_body(request, outputs[0], tokenizer, model)
    return completion_body(request, outputs, model)


def chat_body(request: ChatRequest, output: RequestOutput, tokenizer: Tokenizer, model: str) -> dict[str, Any]:
    choices = []
    for completion in output.outputs:
        logprobs = completion.logprobs
        most = request.sampling.get("logprobs", 0)
        choices.append(
            {
                "index": completion.index,
                "message": {"role": "assistant", "content": completion.text, "refusal": None},
                "logprobs": None if logprobs is None else {"content": _chat_logprobs(completion, tokenizer, most)},
                **_ending(request, completion),
            }
        )
    body = _body("chatcmpl", "chat.completion", model, choices, [output])
    if output.prompt_logprobs is not None:
        body["prompt_logprobs"] = _prompt_logprobs(output)
    if request.return_token_ids:
        body["prompt_token_ids"] = output.prompt_token_ids
    return body


def completion_body(request: CompletionRequest, outputs: Sequence[RequestOutput], model: str) -> dict[str, Any]:
    choices: list[dict[str, Any]] = []
    for output in outputs:
        for completion in output.outputs:
            choice = {
                "index": len(choices),
                "text": completion.text,
                "logprobs": None if completion.logprobs is None else _completion_logprobs(request, completion),
                **_ending(request, completion),
            }
            if output.prompt_logprobs is not None:
                choice["prompt_logprobs"] = _prompt_logprobs(output)
            if request.return_token_ids:
                choice["prompt_token_ids"] = output.prompt_token_ids
            choices.append(choice)
    return _body("cmpl", "text_completion", model, choices, outputs)


def _body(
    prefix: str, kind: str, model: str, choices: list[dict[str, Any]], outputs: Sequence[RequestOutput]
) -> dict[str, Any]:
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }


def _ending(request: APIRequest, completion: CompletionOutput) -> dict[str, Any]:
    """stop_reason: vLLM's; the stop string or token that ended the text."""
    ids = {"token_ids": completion.token_ids} if request.return_token_ids else {}
    return {"finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason, **ids}


def _chat_logprobs(completion: CompletionOutput, tokenizer: Tokenizer, most: int) -> list[dict[str, Any]]:
    assert completion.logprobs is not None
    found = []
    for token_id, logprobs in zip(completion.token_ids, completion.logprobs, strict=True):
        top = [_chat_logprob(i, logprob, tokenizer) for i, logprob in _likeliest(logprobs, most)]
        found.append({**_chat_logprob(token_id, logprobs[token_id], tokenizer), "top_logprobs": top})
    return found


def _chat_logprob(token_id: int, logprob: Logprob, tokenizer: Tokenizer) -> dict[str, Any]:
    """bytes: the token's own, of which its text shows U+FFFD where they are no whole character."""
    return {
        "token": logprob.decoded_token,
        "logprob": max(logprob.logprob, _LEAST),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _completion_logprobs(request: CompletionRequest, completion: CompletionOutput) -> dict[str, list[Any]]:
    """top_logprobs: the likeliest and the sampled one, by text; of tokens with one text the likeliest."""
    assert completion.logprobs is not None
    found: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    offset = 0
    for token_id, logprobs in zip(completion.token_ids, completion.logprobs, strict=True):
        token = logprobs[token_id]
        text = token.decoded_token or ""
        top: dict[str, float] = {}
        for _, logprob in _likeliest(logprobs, -1):
            top.setdefault(logprob.decoded_token or "", max(logprob.logprob, _LEAST))
        for name, value in zip(found, (offset, max(token.logprob, _LEAST), text, top), strict=True):
            found[name].append(value)
        offset += len(text)
    return found


def _likeliest(logprobs: dict[int, Logprob], most: int) -> list[tuple[int, Logprob]]:
    """most: -1 for all."""
    ordered = sorted(logprobs.items(), key=lambda item: (-item[1].logprob, item[1].rank))
    return ordered if most == -1 else ordered[:most]


def _prompt_logprobs(output: RequestOutput) -> list[dict[str, Any] | None]:
    """vLLM's: by token id."""
    assert output.prompt_logprobs is not None
    return [None if found is None else _by_token_id(found) for found in output.prompt_logprobs]


def _by_token_id(found: dict[int, Logprob]) -> dict[str, Any]:
    return {
        str(token_id): {"logprob": max(p.logprob, _LEAST), "rank": p.rank, "decoded_token": p.decoded_token}
        for token_id, p in found.items()
    }
