"""Detokenizer: text that grows by whole characters and is exact to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend
from transformers.convert_slow_tokenizer import bytes_to_unicode

from nanovllm.tokenizer.detokenizer import Detokenizer
from nanovllm.tokenizer.tokenizer import Tokenizer
from nanovllm.weights.gguf import GGUFCheckpoint

EMOJI = "\U0001f600".encode()
WORDS = [b" hello", "é".encode(), " 世界".encode(), EMOJI, EMOJI[:3], EMOJI[3:] + b"!", b"a" + EMOJI[:2], b"\xff\xfe"]


def byte_level() -> tuple[Tokenizer, list[bytes]]:
    """A byte-level vocabulary in which tokens begin and end inside characters, and each token's bytes."""
    expected = [*(bytes([b]) for b in range(256)), *WORDS]
    spelling = bytes_to_unicode()
    vocab = {"".join(spelling[b] for b in token): i for i, token in enumerate(expected)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return _with_added(backend, expected)


def sentencepiece() -> tuple[Tokenizer, list[bytes]]:
    """Pieces with U+2581 for a space and <0xNN> for bytes, and each token's bytes."""
    pieces = ["\u2581", "\u2581hello", "é", "\u2581世\u2581", "a\u2581b", "<0x4>", "0x41"]
    expected = [bytes([b]) for b in range(256)] + [p.replace("\u2581", " ").encode() for p in pieces]
    vocab = {piece: i for i, piece in enumerate([*(f"<0x{b:02X}>" for b in range(256)), *pieces])}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_added(backend, expected)


def _with_added(backend: Backend, expected: list[bytes]) -> tuple[Tokenizer, list[bytes]]:
    """<end> is special; the other is not, and its characters mean themselves."""
    backend.add_tokens([AddedToken("<end>", special=True), AddedToken("<é\u0120>", special=False)])
    return Tokenizer(backend), [*expected, b"<end>", "<é\u0120>".encode()]


KINDS = {"byte-level": byte_level(), "sentencepiece": sentencepiece()}


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return GGUFCheckpoint(smollm2_path).load_tokenizer()


def pieces_of(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    """What each append returns, and flush."""
    return [*map(detokenizer.append, ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(
    picks=st.lists(st.integers(0, 265) | st.integers(0x80, 0xFF) | st.integers(256, 265)),
    skip=st.booleans(),
)
def test_pieces_are_the_bytes_decoded_at_once(kind: str, picks: list[int], skip: bool):
    """Any token sequence, most of them invalid UTF-8."""
    tokenizer, expected = KINDS[kind]
    ids = [i % len(expected) for i in picks]
    kept = [expected[i] for i in ids if not (skip and i == len(expected) - 2)]
    pieces = pieces_of(Detokenizer(tokenizer, skip_special_tokens=skip), ids)
    assert "".join(pieces) == b"".join(kept).decode(errors="replace")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(text=st.text())
def test_a_character_is_emitted_whole_and_at_once(kind: str, text: str):
    """One byte at a time: nothing until a character's last byte, and then that character."""
    detokenizer = Detokenizer(KINDS[kind][0])
    for character in text:
        *first, last = character.encode()  # ids 0..255 are the bytes in both vocabularies
        assert [detokenizer.append(i) for i in first] == [""] * len(first)
        assert detokenizer.append(last) == character
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_invalid_bytes_become_replacement_characters(kind: str):
    detokenizer = Detokenizer(KINDS[kind][0])
    assert detokenizer.append(0xFF) == "\ufffd"  # never part of a character: no waiting
    assert [detokenizer.append(i) for i in (0xF0, 0x9F)] == ["", ""]
    assert detokenizer.append(ord("a")) == "\ufffda"  # cut short: one for both bytes
    assert [detokenizer.append(i) for i in (0xE4, 0xB8)] == ["", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_special_tokens_are_skipped_or_kept():
    tokenizer, expected = KINDS["byte-level"]
    ids = [ord("a"), len(expected) - 2, ord("b"), len(expected) - 1]
    assert pieces_of(Detokenizer(tokenizer), ids) == ["a", "", "b", "<é\u0120>", ""]
    assert pieces_of(Detokenizer(tokenizer, skip_special_tokens=False), ids) == ["a", "<end>", "b", "<é\u0120>", ""]


def test_a_skipped_token_does_not_break_a_character():
    tokenizer, expected = KINDS["byte-level"]
    first, second = "é".encode()
    assert pieces_of(Detokenizer(tokenizer), [first, len(expected) - 2, second]) == ["", "", "é", ""]


def test_sentencepiece_keeps_the_space_between_pieces():
    """The library's own decoders strip one when each token is decoded alone."""
    tokenizer, expected = KINDS["sentencepiece"]
    hello = expected.index(b" hello")
    assert pieces_of(Detokenizer(tokenizer), [ord("a"), hello, hello]) == ["a", " hello", " hello", ""]


TEXTS = [
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
    "naïve café 世界 \u0928\u092e\u0938\u094d\u0924\u0947",
    "x = 1\n\t\treturn  x",
]


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_streams_the_text_it_encoded(smollm2: Tokenizer, text: str):
    ids = smollm2.encode(text)
    pieces = pieces_of(Detokenizer(smollm2), ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_smollm2_splits_an_emoji_over_tokens(smollm2: Tokenizer):
    ids = smollm2.encode("\U0001f9ff")
    assert len(ids) > 1  # otherwise this shows nothing
    assert pieces_of(Detokenizer(smollm2), ids) == [""] * (len(ids) - 1) + ["\U0001f9ff", ""]


@settings(max_examples=100, deadline=None)
@given(prompt=st.text(max_size=20), more=st.lists(st.integers(0, 49151), max_size=20))
def test_smollm2_same_as_the_librarys_decode(smollm2: Tokenizer, prompt: str, more: list[int]):
    """For text, and for any ids after it, also where they are no valid text."""
    for ids in (smollm2.encode(prompt), smollm2.encode(prompt) + more):
        assert "".join(pieces_of(Detokenizer(smollm2), ids)) == smollm2.backend.decode(ids)
