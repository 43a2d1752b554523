"""Fixtures that several folders share: small random models, and the real SmolLM2."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from helpers import byte_tokenizer
from tiny_models import make_tiny_model

ALIAS = "smollm2-135m"


@pytest.fixture
def interruptible_children():
    """A shell starts background jobs with Ctrl-C ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory):
    """tiny_model("llama") -> the directory of a saved random model."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny_model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama over bytes, with tokenizer and chat template."""
    path = tmp_path_factory.mktemp("chat")
    make_tiny_model("llama", path, vocab_size=258, bos_token_id=256, eos_token_id=257)
    byte_tokenizer().backend.save(str(path / "tokenizer.json"))
    template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}bot: {% endif %}"
    )
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real model's GGUF file, fetched on first use."""
    from nanovllm.weights.hub import resolve_model

    return resolve_model(ALIAS)
