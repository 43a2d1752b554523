"""Tokenizers from GGUF metadata, against transformers, `regex` and a naive SentencePiece."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import regex
from gguf_converter import read_quickly
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from nanovllm.errors import ModelNotSupported
from nanovllm.tokenizer.gguf_tokenizer import tokenizer_from_gguf
from nanovllm.tokenizer.tokenizer import Tokenizer
from nanovllm.weights.gguf import GGUFCheckpoint

BYTE_SPELLING = bytes_to_unicode()
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # GGUF's token types

# ---- SmolLM2's own file

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces   and trailing   ",
    "\n\n\t\r\n mixed \u00a0\u3000 whitespace \u200b",
    "It's we'll THEY'VE I'd 'quoted' don\u2019t",
    "0 12 345 6789 3.14159 1e-9 2024-01-01",
    "naïve café Ångström e\u0301 ﬁ \u017f ß İ",
    "日本語のテキスト。中文\uff0c한국어 ไทย עברית العربية हिन्दी",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \u2764\ufe0f",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # comment\n\n\nclass A_b2(C): ...",
    'https://example.org/a_b?q=1&r=%20#top <div class="x">&amp;</div> $\\frac{1}{2}$',
    "<|im_start|>user\nHi<|im_end|><|endoftext|> <repo_name>x<|im_start|>",
    "\x00\x01\x7f\ufeff\ufffd\ue000\U0010ffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa------========",
]


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return GGUFCheckpoint(smollm2_path).load_tokenizer()


@pytest.fixture(scope="module")
def peer(smollm2_path: Path) -> Any:
    from transformers import AutoTokenizer

    with read_quickly():
        return AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)


def test_smollm2_same_as_transformers(smollm2: Tokenizer, peer: Any):
    for text in TEXTS:
        ids = smollm2.encode(text)
        assert ids == peer(text)["input_ids"], text
        assert smollm2.decode(ids, skip_special_tokens=False) == peer.decode(ids, skip_special_tokens=False), text


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30) | st.text("aB 'sé\n\t世\U0001f600.-_<|>", max_size=30))
def test_smollm2_same_as_transformers_without_digits(smollm2: Tokenizer, peer: Any, text: str):
    """transformers reads GGUF's vocabulary and merges, but takes every pre-tokenizer for GPT-2's."""
    text = regex.sub(r"\p{N}", "", text)
    assert smollm2.encode(text) == peer(text)["input_ids"]


@settings(max_examples=60, deadline=None)
@given(text=st.text("ab 1\u0663½²\n\t'.", max_size=30))
def test_smollm2_sets_each_digit_apart(smollm2: Tokenizer, peer: Any, text: str):
    """SmolLM2's own rule: first every digit is cut out, then GPT-2's rule cuts what is between."""
    spans = regex.split(r"(\p{N})", text)
    cuts = [m[0] for span in spans for m in regex.finditer(PATTERNS["gpt-2"], span)]
    spelled = ["".join(BYTE_SPELLING[b] for b in cut.encode()) for cut in cuts]
    expected = [token.id for word in spelled for token in peer.backend_tokenizer.model.tokenize(word)]
    assert smollm2.encode(text) == expected


def test_smollm2_special_tokens(smollm2: Tokenizer, peer: Any):
    assert (smollm2.bos_token, smollm2.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (smollm2.bos_token_id, smollm2.eos_token_id) == (1, 2)
    assert smollm2.vocab_size == len(peer) == 49152
    assert smollm2.encode("<|im_start|>a")[0] == 1
    assert smollm2.decode([1, *smollm2.encode("a"), 2]) == "a"
    assert smollm2.chat_template == peer.chat_template


# ---- byte-level BPE

PATTERNS = {  # from the models' own tokenizer.json
    "gpt-2": r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
PATTERNS["dbrx"] = PATTERNS["llama-bpe"]  # cl100k's, as Granite 4 has it
CUT_TEXTS = st.lists(
    st.sampled_from(
        [*" \n\r\t\u00a0\u3000'.,-_(é世aZ\u017f1\u0663½", "'s", "'LL", "123", "  ", "\r\n", "\U0001f600", "e\u0301"]
    )
).map("".join)


def byte_level(
    pre: str | None = "gpt-2", merges: tuple[str, ...] = (), extra: dict[str, int] | None = None, **keys: Any
):
    """Metadata: one token per byte, one per merge, then `extra` tokens with their types."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [m.replace(" ", "") for m in merges]
    types = [NORMAL] * len(tokens) + list((extra or {}).values())
    metadata = {"model": "gpt2", "tokens": tokens + list(extra or {}), "token_type": types, "merges": list(merges)}
    metadata |= {"pre": pre} if pre else {}
    return {f"tokenizer.ggml.{key}": value for key, value in {**metadata, **keys}.items()}


def words(metadata: dict[str, Any], text: str) -> list[str]:
    """The tokens of `text`, as text."""
    tokenizer = tokenizer_from_gguf(metadata)
    return [tokenizer.token_text(i) for i in tokenizer.encode(text, add_special_tokens=False)]


@pytest.mark.parametrize("pre", PATTERNS)
@settings(max_examples=150, deadline=None)
@given(text=CUT_TEXTS)
def test_cuts_same_as_regex(pre: str, text: str):
    backend = _CUTTERS[pre].backend
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    cuts = [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert cuts == [m[0] for m in regex.finditer(PATTERNS[pre], text)]


_CUTTERS = {pre: tokenizer_from_gguf(byte_level(pre)) for pre in PATTERNS}


def falcon_cuts(text: str) -> list[str]:
    """Punctuation, GPT-2's rule, runs of digits, and three digits each from the left; in byte spelling,
    where the bytes of some characters are digits like \u00b2."""
    cuts = []
    for run in regex.findall(r"[\p{P}$+<=>^`|~]+|[^\p{P}$+<=>^`|~]+", text):
        for word in (m[0] for m in regex.finditer(PATTERNS["gpt-2"], run)):
            spelled = "".join(BYTE_SPELLING[b] for b in word.encode())
            for _, group in itertools.groupby(spelled, str.isnumeric):
                cuts += regex.findall(r"[0-9]{3}|(?:(?![0-9]{3}).)+", "".join(group), regex.S)
    return cuts


@settings(max_examples=200, deadline=None)
@given(text=CUT_TEXTS | st.text("a 1234\u00bd\u0663.,'s$\n", max_size=12))
def test_falcon_cuts(text: str):
    backend = tokenizer_from_gguf(byte_level("falcon")).backend
    assert [cut for cut, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == falcon_cuts(text)


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["1234"]),
        (None, ["1234"]),
        ("llama-bpe", ["123", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("smollm", ["1", "2", "3", "4"]),
        ("refact", ["1", "2", "3", "4"]),
        ("dbrx", ["123", "4"]),
        ("falcon", ["123", "4"]),
        ("tekken", ["1", "2", "3", "4"]),
    ],
)
def test_digits_join_as_far_as_the_pre_tokenizer_lets_them(pre: str | None, expected: list[str]):
    assert words(byte_level(pre, ("1 2", "12 3", "123 4")), "1234") == expected


def test_merges_apply_in_their_order():
    assert words(byte_level(merges=("b c", "a b", "bc d")), "abcd") == ["a", "bcd"]
    assert words(byte_level(merges=("a b", "b c", "bc d")), "abcd") == ["ab", "c", "d"]


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "llama-v3", "tekken"])
def test_a_whole_word_that_no_merge_makes(pre: str):
    """ignore_merges of Llama 3's and Nemo's tokenizer.json."""
    extra = {"abcd": NORMAL}
    assert words(byte_level(pre, ("a b",), extra), "abcd") == ["abcd"]
    assert words(byte_level("dbrx", ("a b",), extra), "abcd") == ["ab", "c", "d"]


def test_qwen2_composes_characters():
    tokenizer = tokenizer_from_gguf(byte_level("qwen2"))
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "é"
    tokenizer = tokenizer_from_gguf(byte_level("llama-bpe"))
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "e\u0301"


def test_control_and_user_defined_tokens_are_found_in_text():
    """Both are one token; only control tokens are special. A normal one is found by merges alone."""
    tokenizer = tokenizer_from_gguf(byte_level(extra={"<|end|>": CONTROL, "<é>": USER_DEFINED, "<n>": NORMAL}))
    assert tokenizer.encode("a<|end|><é>")[1:] == [256, 257]
    assert tokenizer.special_ids == {256}
    assert tokenizer.token_bytes(257) == "<é>".encode()
    assert tokenizer.decode([256, *tokenizer.encode("a")]) == "a"
    assert 258 not in tokenizer.encode("<n>")


# ---- SentencePiece BPE

PIECES = ["h", "e", "l", "o", "w", "r", "a", "b", "\u2581", "你", "é"]
MERGED = [
    *["he", "ll", "lo", "ell", "hell", "hello", "\u2581h", "\u2581he", "\u2581hello", "\u2581w", "or", "wor", "wo"],
    *["\u2581\u2581", "\u2581\u2581\u2581\u2581", "aa", "aaa", "aaaa", "ab", "aab", "ba", "b\u2581", "é你", "你\u2581"],
]


def sentencepiece(scores: dict[str, float], extra: dict[str, int] | None = None, **keys: Any) -> dict[str, Any]:
    """Metadata of a "llama" tokenizer: <unk> <s> </s>, 256 bytes, scored pieces, `extra` with their types."""
    extra = extra or {}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *scores, *extra]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(scores)
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + list(scores.values()) + [0.0] * len(extra),
        "token_type": types + list(extra.values()),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in {**metadata, **keys}.items()}


def ranked(merged: list[str]) -> dict[str, float]:
    """As SentencePiece trains it: each merged piece scores one less than the one before; characters last."""
    return {piece: -float(i) for i, piece in enumerate([*merged, *PIECES])}


def naive_sentencepiece(metadata: dict[str, Any], text: str, space_prefix: bool = True) -> list[int]:
    """Join the best pair, the leftmost on ties, until no pair is a piece; then bytes for unknown characters."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens)}
    symbols = list(((" " if space_prefix and text else "") + text).replace(" ", "\u2581"))
    while True:
        pairs = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in ids]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [i for s in symbols for i in ([ids[s]] if s in ids else [ids[f"<0x{b:02X}>"] for b in s.encode()])]


@settings(max_examples=200, deadline=None)
@given(
    merged=st.permutations(MERGED),
    texts=st.lists(st.text("helowrab é你\n\U0001f600", max_size=20), min_size=3, max_size=6),
)
def test_sentencepiece_same_as_naive(merged: list[str], texts: list[str]):
    metadata = sentencepiece(ranked(merged))
    tokenizer = tokenizer_from_gguf(metadata)
    for text in [*texts, "hello world", "aaaaaaa baab", "   hello  "]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == naive_sentencepiece(metadata, text)
        assert tokenizer.decode(ids) == text


@settings(max_examples=60, deadline=None)
@given(text=st.text("hello wab", max_size=20))
def test_sentencepiece_without_a_space_prefix(text: str):
    """Decoding used to strip a leading space that no encoder had added."""
    metadata = sentencepiece(ranked(MERGED), add_space_prefix=False)
    tokenizer = tokenizer_from_gguf(metadata)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == naive_sentencepiece(metadata, text, space_prefix=False)
    assert tokenizer.decode(ids) == text


GEMMA = {"<start_of_turn>": CONTROL, "\n": USER_DEFINED, "\n\n": USER_DEFINED, "  ": USER_DEFINED, "   ": USER_DEFINED}


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.sampled_from([*"helo \nwab", "  ", "   ", "hello", "<start_of_turn>"]), max_size=12))
def test_gemmas_own_pieces_go_first(texts: list[str]):
    """Line breaks and runs of spaces, which the converter writes as they are in text, are cut out
    longest first, before any pair is joined."""
    text = "".join(texts)
    metadata = sentencepiece(ranked(MERGED), GEMMA, add_space_prefix=False)
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    expected = []
    for part in regex.split(r"(<start_of_turn>|   |  |\n\n|\n)", text):
        expected += [ids[part]] if part in GEMMA else naive_sentencepiece(metadata, part, space_prefix=False)
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    assert tokenizer.decode(expected, skip_special_tokens=False) == text
    assert b"".join(map(tokenizer.token_bytes, expected)) == text.encode()


def test_sentencepiece_falls_back_to_bytes():
    tokenizer = tokenizer_from_gguf(sentencepiece(ranked(MERGED)))
    ids = tokenizer.encode("h\U0001f600\n", add_special_tokens=False)
    assert [tokenizer.token_bytes(i) for i in ids] == [b" h", b"\xf0", b"\x9f", b"\x98", b"\x80", b"\n"]


# ---- BOS and EOS


@pytest.mark.parametrize(
    ("metadata", "bos", "eos"),
    [
        (sentencepiece(ranked(MERGED)), True, False),
        (sentencepiece(ranked(MERGED), add_bos_token=False), False, False),
        (sentencepiece(ranked(MERGED), add_bos_token=True, add_eos_token=True), True, True),
        (sentencepiece(ranked(MERGED), add_bos_token=False, add_eos_token=True), False, True),
        (byte_level("llama-bpe", extra={"<s>": CONTROL, "</s>": CONTROL}), True, False),
        (byte_level("tekken", extra={"<s>": CONTROL, "</s>": CONTROL}), True, False),
        (byte_level("dbrx", extra={"<s>": CONTROL, "</s>": CONTROL}), False, False),
        (byte_level("qwen2", extra={"<s>": CONTROL, "</s>": CONTROL}), False, False),
        (byte_level("qwen2", extra={"<s>": CONTROL, "</s>": CONTROL}, add_bos_token=True), True, False),
        (byte_level("gpt-2", extra={"<s>": CONTROL, "</s>": CONTROL}, add_eos_token=True), False, True),
    ],
)
def test_frame(metadata: dict[str, Any], bos: bool, eos: bool):
    tokens = metadata["tokenizer.ggml.tokens"]
    first, last = tokens.index("<s>"), tokens.index("</s>")
    tokenizer = tokenizer_from_gguf({**metadata, **_ids(first, last)})
    text = tokenizer.encode("hello", add_special_tokens=False)
    assert first not in text and last not in text
    assert tokenizer.encode("hello") == [first] * bos + text + [last] * eos
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (first, last)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"


def _ids(bos: int, eos: int) -> dict[str, int]:
    return {"tokenizer.ggml.bos_token_id": bos, "tokenizer.ggml.eos_token_id": eos}


def test_one_token_can_be_bos_and_eos():
    """As <|endoftext|> in GPT-2's family."""
    metadata = byte_level(extra={"<|endoftext|>": CONTROL}, add_bos_token=True, add_eos_token=True)
    ids = tokenizer_from_gguf({**metadata, **_ids(256, 256)}).encode("a")
    assert ids[0] == ids[-1] == 256 and len(ids) == 3


def test_no_bos_in_the_file_frames_nothing():
    assert len(tokenizer_from_gguf(byte_level("llama-bpe")).encode("a")) == 1


# ---- what is not supported


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", None])
def test_unknown_model(model: str | None):
    metadata = {} if model is None else {"tokenizer.ggml.model": model}
    with pytest.raises(ModelNotSupported, match=rf"{model!r} is not supported.*skip_tokenizer_init"):
        tokenizer_from_gguf(metadata)


def test_unknown_pre_tokenizer_names_those_that_work():
    with pytest.raises(ModelNotSupported, match=r"'deepseek-llm' is not supported.*falcon, gpt-2, llama-bpe,"):
        tokenizer_from_gguf(byte_level("deepseek-llm"))
