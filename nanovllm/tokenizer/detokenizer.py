"""Detokenizer: token ids to text as they come, never half a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from nanovllm.tokenizer.tokenizer import Tokenizer


class Detokenizer:
    """Incremental UTF-8 over the tokens' exact bytes.

    Bytes of an incomplete character are kept until it is complete; bytes that can never be
    one become U+FFFD, as in `bytes.decode(errors="replace")`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def append(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        return self._utf8.decode(b"".join([self._tokenizer.token_bytes(i) for i in token_ids if i not in self._skip]))

    def flush(self) -> str:
        """What is left when no more tokens come: U+FFFD for an incomplete character, or nothing."""
        return self._utf8.decode(b"", final=True)
