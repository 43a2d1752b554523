"""Tokenizer: a directory's files, special tokens, and the bytes of each token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from nanovllm.errors import ModelNotFound, ModelNotSupported, RequestError
from nanovllm.tokenizer.tokenizer import Tokenizer

BYTES = pre_tokenizers.ByteLevel.alphabet()
USER = [{"role": "user", "content": "Hi"}]


def byte_backend() -> Backend:
    """One token per byte; <s> and </s> are special, <tool é> is added but is text."""
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(sorted(BYTES))}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<tool é>", normalized=False)])
    return backend


@pytest.fixture
def folder(tmp_path: Path):
    """folder(backend, config, template) -> a model directory with these files."""

    def make(backend: Backend | None = None, config: Any = None, template: str | None = None) -> Path:
        (backend or byte_backend()).save(str(tmp_path / "tokenizer.json"))
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        return tmp_path

    return make


# ---- a directory's files


@pytest.mark.parametrize("as_dict", [False, True])
def test_special_tokens_as_text_or_as_added_tokens(folder: Any, as_dict: bool):
    def spell(token: str) -> Any:
        return {"__type": "AddedToken", "content": token, "lstrip": False} if as_dict else token

    tokenizer = Tokenizer.from_directory(folder(config={"bos_token": spell("<s>"), "eos_token": spell("</s>")}))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)
    assert tokenizer.special_ids == {256, 257}
    assert tokenizer.vocab_size == 259


@pytest.mark.parametrize("config", [None, {}, {"bos_token": None, "eos_token": None}])
def test_no_special_tokens(folder: Any, config: Any):
    tokenizer = Tokenizer.from_directory(folder(config=config))
    assert tokenizer.bos_token is None and tokenizer.bos_token_id is None
    assert tokenizer.eos_token is None and tokenizer.eos_token_id is None
    assert tokenizer.chat_template is None


def test_eos_that_the_vocabulary_lacks_has_no_id(folder: Any):
    tokenizer = Tokenizer.from_directory(folder(config={"eos_token": "<|nowhere|>"}))
    assert tokenizer.eos_token == "<|nowhere|>" and tokenizer.eos_token_id is None


NAMED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D{{ messages[0].content }}"}]


@pytest.mark.parametrize(
    ("in_config", "in_file", "expected"),
    [
        ("C{{ messages[0].content }}", None, "CHi"),
        (NAMED, None, "DHi"),
        (None, "é{{ messages[0].content }}", "éHi"),
        ("C", "F", "F"),  # the file is the newer way, and goes first as in transformers
    ],
)
def test_chat_template_comes_from(folder: Any, in_config: Any, in_file: str | None, expected: str):
    tokenizer = Tokenizer.from_directory(folder(config={"chat_template": in_config}, template=in_file))
    assert tokenizer.apply_chat_template(USER, tokenize=False) == expected


def test_named_chat_templates_without_a_default_are_none(folder: Any):
    tokenizer = Tokenizer.from_directory(folder(config={"chat_template": NAMED[:1]}))
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.apply_chat_template(USER)


def test_missing_tokenizer_json_says_what_to_do(tmp_path: Path):
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json does not exist.*skip_tokenizer_init"):
        Tokenizer.from_directory(tmp_path)


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> Path:
    """As GPT-2's repository was before there was a tokenizer.json."""
    merges = ["h e", "l l", "\u0120 he", "he ll", "hell o", "1 2", "\u0120 w"]
    tokens = [*sorted(BYTES), *(m.replace(" ", "") for m in merges), "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("config", [None, {}, {"add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer"}])
def test_gpt2s_own_files(gpt2_folder: Path, config: Any):
    """As transformers reads them, with one token for both ends."""
    from transformers import GPT2Tokenizer

    if config is not None:
        (gpt2_folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, peer = Tokenizer.from_directory(gpt2_folder), GPT2Tokenizer.from_pretrained(gpt2_folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|endoftext|>", "<|endoftext|>")
    assert tokenizer.eos_token_id == peer.eos_token_id == 263
    assert tokenizer.special_ids == {263}
    for text in ("hello hello", " he'll \n\n 1212 é\U0001f600", "a<|endoftext|>b", ""):
        ids = tokenizer.encode(text)
        assert ids == peer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=False) == peer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("config", [{"tokenizer_class": "Qwen2Tokenizer"}, {"add_bos_token": True}], ids=str)
def test_the_same_files_of_other_tokenizers(gpt2_folder: Path, config: Any):
    """Qwen 2's are named the same and cut text otherwise."""
    (gpt2_folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelNotSupported, match=r"no tokenizer\.json.*save it with transformers"):
        Tokenizer.from_directory(gpt2_folder)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_damaged_files_of_gpt2(gpt2_folder: Path, name: str):
    (gpt2_folder / name).write_bytes(b"\xff{")
    with pytest.raises(ModelNotSupported, match=r"vocab\.json and merges\.txt are no tokenizer"):
        Tokenizer.from_directory(gpt2_folder)
    if name == "merges.txt":
        (gpt2_folder / name).unlink()
        with pytest.raises(ModelNotSupported, match="are no tokenizer"):
            Tokenizer.from_directory(gpt2_folder)


def test_tokenizer_json_goes_before_gpt2s_files(folder: Any, gpt2_folder: Path):
    assert Tokenizer.from_directory(folder()).vocab_size == 259


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "Unheard"}}'])
def test_unreadable_tokenizer_json(tmp_path: Path, content: str):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelNotSupported, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"", b'{"bos_token": "\xff"}', b"[]", b'"<s>"'])
def test_broken_tokenizer_config(folder: Any, content: bytes):
    path = folder()
    (path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ModelNotFound, match=r"tokenizer_config\.json is not"):
        Tokenizer.from_directory(path)


@pytest.mark.parametrize(
    "decoder", [decoders.WordPiece(), decoders.BPEDecoder(), decoders.Sequence([decoders.Fuse()]), None]
)
def test_unsupported_decoder(folder: Any, decoder: Any):
    """Their tokens' bytes depend on the neighbours, so streamed text could not be exact."""
    backend = Backend(models.WordPiece(vocab={"[UNK]": 0}, unk_token="[UNK]"))
    if decoder is not None:
        backend.decoder = decoder
    name = "None" if decoder is None else "Fuse" if "Sequence" in repr(decoder) else type(decoder).__name__
    with pytest.raises(ModelNotSupported, match=f"decode with {name}.*skip_tokenizer_init"):
        Tokenizer.from_directory(folder(backend))


# ---- text to ids and back


def test_truncation_and_padding_of_the_file_are_off(folder: Any):
    backend = byte_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.from_directory(folder(backend))
    assert len(tokenizer.encode("ab")) == 2
    assert len(tokenizer.encode("abcdefghij")) == 10


def test_encode_frames_the_text_only_if_the_post_processor_says_so(folder: Any):
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    plain = Tokenizer.from_directory(folder(config=config))
    backend = byte_backend()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    framed = Tokenizer.from_directory(folder(backend, config))
    a = plain.encode("a")
    assert len(a) == 1
    assert framed.encode("a") == [256, *a]
    assert framed.encode("a", add_special_tokens=False) == a
    assert framed.encode("") == [256]


def test_chat_is_not_framed_twice(folder: Any):
    """The template writes BOS itself, so the post-processor must not."""
    backend = byte_backend()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    config = {"bos_token": "<s>", "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    tokenizer = Tokenizer.from_directory(folder(backend, config))
    assert tokenizer.apply_chat_template(USER) == [256, *tokenizer.encode("Hi", add_special_tokens=False)]


def test_decode_skips_special_tokens_or_not(folder: Any):
    tokenizer = Tokenizer.from_directory(folder())
    ids = tokenizer.encode("<s>né\U0001f600</s>")
    assert ids[0] == 256 and ids[-1] == 257
    assert tokenizer.decode(ids) == "né\U0001f600"
    assert tokenizer.decode(tuple(ids), skip_special_tokens=False) == "<s>né\U0001f600</s>"


def test_half_a_surrogate_pair_is_a_request_error(folder: Any):
    """JSON can carry one ("\\ud83d"); it used to reach the user as the library's bare TypeError."""
    with pytest.raises(RequestError, match="surrogate"):
        Tokenizer.from_directory(folder()).encode("\ud83d")


# ---- bytes of tokens


def test_token_bytes_are_the_texts_bytes(folder: Any):
    tokenizer = Tokenizer.from_directory(folder())
    text = "a é\n\t\x00\x7f\xad\xa0世\U0001f600"
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode(text)] == [bytes([b]) for b in text.encode()]
    assert sorted(tokenizer.token_bytes(i) for i in range(256)) == [bytes([b]) for b in range(256)]


def test_token_bytes_of_added_tokens_are_their_text(folder: Any):
    """Not read through the byte-level table, where é would be the byte E9."""
    tokenizer = Tokenizer.from_directory(folder())
    assert tokenizer.token_bytes(256) == b"<s>"
    (tool,) = tokenizer.encode("<tool é>")
    assert tokenizer.token_bytes(tool) == "<tool é>".encode()
    assert tool not in tokenizer.special_ids


@pytest.mark.parametrize("token_id", [259, 2**31, 2**32, 2**64, -1])
def test_token_bytes_outside_the_vocabulary_are_empty(folder: Any, token_id: int):
    """Ids that the library's 32 bits cannot hold used to raise OverflowError."""
    tokenizer = Tokenizer.from_directory(folder())
    assert tokenizer.token_bytes(token_id) == b""
    assert tokenizer.token_text(token_id) == ""


def test_token_text_of_half_a_character(folder: Any):
    tokenizer = Tokenizer.from_directory(folder())
    first, second, a = tokenizer.encode("éa")
    assert [tokenizer.token_text(i) for i in (first, second, a)] == ["\ufffd", "\ufffd", "a"]


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Metaspace(),
    ],
)
def test_sentencepiece_token_bytes(folder: Any, decoder: Any):
    pieces = ["<unk>", "<0x0A>", "<0xfF>", "\u2581a\u2581", "é", "<0xGG>", "x<0x0A>"]
    backend = Backend(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoder
    tokenizer = Tokenizer.from_directory(folder(backend))
    assert [tokenizer.token_bytes(i) for i in range(1, 7)] == [
        b"\n",
        b"\xff",
        b" a ",
        "é".encode(),
        b"<0xGG>",
        b"x<0x0A>",
    ]


def test_byte_level_token_that_is_plain_text(folder: Any):
    """Some vocabularies list whole words unspelled, such as CJK ones that were appended later."""
    backend = Backend(models.BPE(vocab={"a": 0, "世界": 1}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    assert Tokenizer.from_directory(folder(backend)).token_bytes(1) == "世界".encode()
