"""Detokenizer: token ids to text as they come, never half a character."""

from __future__ import annotations

import codecs

from nanovllm.tokenizer.tokenizer import Tokenizer


class Detokenizer:
    """Incremental UTF-8 over the tokens' exact bytes.

    Bytes of an incomplete character are kept until it is complete; bytes that can never be
    one become U+FFFD, as in `bytes.decode(errors="replace")`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._texts = tokenizer.whole_texts
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._incomplete = False  # whether the decoder keeps bytes

    def append(self, token_id: int) -> str:
        """The text that this token completes."""
        if token_id in self._skip:
            return ""
        if not self._incomplete:
            text = self._texts[token_id]
            if text is not None:
                return text
        text = self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self._incomplete = self._utf8.getstate()[0] != b""
        return text

    def flush(self) -> str:
        """What is left when no more tokens come: U+FFFD for an incomplete character, or nothing."""
        self._incomplete = False
        return self._utf8.decode(b"", final=True)
