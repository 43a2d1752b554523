"""Tokenizer: the `tokenizers` library with what an engine needs beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from nanovllm.errors import ModelNotFound, ModelNotSupported, RequestError
from nanovllm.json_file import read_json

Message = Mapping[str, Any]
"""One turn of a conversation: {"role": ..., "content": ...}."""

_GPT2_END = "<|endoftext|>"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Text <-> token ids, the exact bytes of each token, and the model's chat template."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.chat_template = chat_template
        self._added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self._to_bytes = _bytes_rule(backend.decoder)
        self._bytes: dict[int, bytes] = {}
        self.whole_texts = _WholeTexts(self)

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """Read tokenizer.json, or GPT-2's vocab.json and merges.txt, and where they exist
        tokenizer_config.json and the chat template."""
        settings = path / "tokenizer_config.json"
        config = read_json(settings) if settings.is_file() else {}
        if not (path / "tokenizer.json").is_file() and (path / "vocab.json").is_file():
            config = {"bos_token": _GPT2_END, "eos_token": _GPT2_END} | config
            backend = _gpt2_backend(path, config)
        else:
            backend = _read_backend(path / "tokenizer.json")
        template = path / "chat_template.jinja"
        return cls(
            backend,
            bos_token=_token_text(config.get("bos_token")),
            eos_token=_token_text(config.get("eos_token")),
            chat_template=template.read_text(encoding="utf-8") if template.is_file() else _template_text(config),
        )

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The `tokenizers.Tokenizer` underneath."""
        return self._backend

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token_id(self) -> int | None:
        return None if self.eos_token is None else self._backend.token_to_id(self.eos_token)

    @property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self._backend.token_to_id(self.bos_token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the tokenizer's own BOS/EOS unless told otherwise.

        RequestError for half of a surrogate pair, which JSON can carry but UTF-8 cannot.
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise RequestError(f"only Unicode text without lone surrogates can be tokenised: {error}") from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids, as transformers' `decode` gives it."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token in running text; empty for an id outside the vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._lookup_bytes(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        """One token as text; U+FFFD stands for bytes that are no whole character."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str | list[int]:
        """Render a conversation with the model's template; RequestError if it has none."""
        from nanovllm.tokenizer.chat_template import render_chat  # jinja2 is a tenth of the import time

        template = chat_template or self.chat_template
        if template is None:
            raise RequestError("this model's files hold no chat template; pass chat_template=... or use generate()")
        text = render_chat(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos_token or "",
            eos_token=self.eos_token or "",
            **variables,
        )
        # the template has written the special tokens itself
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _lookup_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].content.encode()
        if not 0 <= token_id < 1 << 32:  # beyond what the library's ids can hold
            return b""
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._to_bytes(token)


class _WholeTexts(dict[int, "str | None"]):
    """Of each token the text that it is by itself, None where its bytes are not whole characters; found when
    it is first asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str | None:
        text: str | None
        try:
            text = self._tokenizer.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            text = None
        self[token_id] = text
        return text


def _byte_level_table() -> dict[str, int]:
    """Inverse of GPT-2's byte-to-character table (Radford et al. 2019): printable bytes stand
    for themselves, the others follow from U+0100 in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_LEVEL = _byte_level_table()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_LEVEL[c] for c in token)
    except KeyError:  # a token that was added as plain text
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace("\u2581", " ").encode()


def _bytes_rule(decoder: Any) -> Any:
    """The function from a token's spelling to its bytes, by the tokenizer's decoder."""
    spec = json.loads(decoder.__getstate__()) if decoder is not None else {"type": None}
    kinds = {d["type"] for d in spec.get("decoders", [spec])}
    if "ByteLevel" in kinds:
        return _byte_level_bytes
    if kinds & {"ByteFallback", "Metaspace"}:
        return _sentencepiece_bytes
    raise ModelNotSupported(
        f"tokenizers that decode with {', '.join(map(str, kinds))} are not supported; "
        "byte-level BPE and SentencePiece are. Set skip_tokenizer_init=True and pass token ids"
    )


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    if not file.is_file():
        raise ModelNotFound(
            f"{file} does not exist. Save it with transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...), give tokenizer=..., "
            "or set skip_tokenizer_init=True and pass token ids"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ModelNotSupported(f"{file} is not a tokenizer that this version reads: {error}") from error


def _gpt2_backend(path: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """From the files that came before tokenizer.json. Other classes read the same files in other ways."""
    kind = config.get("tokenizer_class") or "GPT2Tokenizer"
    if kind not in ("GPT2Tokenizer", "GPT2TokenizerFast") or config.get("add_bos_token"):
        raise ModelNotSupported(
            f"{path} has no tokenizer.json, and the vocab.json of a {kind} (add_bos_token="
            f"{config.get('add_bos_token', False)}) cannot be read without it; save it with transformers"
        )
    try:
        model = tokenizers.models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"))
    except Exception as error:  # the library raises bare Exception
        raise ModelNotSupported(f"{path}: vocab.json and merges.txt are no tokenizer: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = {_token_text(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    backend.add_special_tokens([token for token in special if token and backend.token_to_id(token) is not None])
    return backend


def _token_text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _template_text(config: dict[str, Any]) -> str | None:
    """A template, or the one called "default" of several named ones."""
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}.get("default")
    return template
