"""Batch files for tests, and what is compared of their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def request(custom_id: str, prompt: Any, **fields) -> dict[str, Any]:
    """Of a chat if the prompt is a list of messages, else of a completion."""
    chat = isinstance(prompt, list) and isinstance(prompt[0], dict)
    body = {"messages" if chat else "prompt": prompt, **fields}
    url = "/v1/chat/completions" if chat else "/v1/completions"
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def write(file: Path, *lines: dict[str, Any] | str) -> Path:
    file.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return file


def mixed(count: int, tokens: int = 40) -> list[dict[str, Any]]:
    """Greedy, seeded and unseeded requests of many lengths."""
    kinds = ({"temperature": 0, "ignore_eos": True}, {"seed": 3}, {"temperature": 1.5, "n": 2})
    return [
        request(
            f"r{i}", say(f"number {i}") if i % 2 else [f"text {i}", "more"], **kinds[i % 3], max_tokens=tokens + i % 7
        )
        for i in range(count)
    ]


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def texts(line: dict[str, Any]) -> list[str]:
    choices = line["response"]["body"]["choices"]
    return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]


def contents(file: Path) -> list[Any]:
    """All that does not differ from run to run."""
    for line in (lines := read(file)):
        del line["id"], line["response"]["request_id"]
        for name in ("id", "created"):
            line["response"]["body"].pop(name, None)
    return lines
