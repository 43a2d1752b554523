"""Tokenizers that live inside a GGUF file, rebuilt for the `tokenizers` library."""

from __future__ import annotations

from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import Tokenizer as Backend

from nanovllm.errors import ModelNotSupported
from nanovllm.tokenizer.tokenizer import Tokenizer

# GGUF's token types
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

# How text is cut before BPE, by GGUF's name for it. None: GPT-2's own rule.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (  # Mistral Nemo
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS: dict[str, str | None] = {
    "gpt-2": None,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": _LLAMA3,  # Granite 4
    "qwen2": _QWEN2,
    "tekken": _TEKKEN,
}
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell"}  # refact: Granite 3
# These take a word that is a token without merging it, and begin a text with BOS.
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "tekken"}


def tokenizer_from_gguf(metadata: dict[str, Any]) -> Tokenizer:
    """Build from a GGUF file's key-value section; ModelNotSupported for unknown kinds."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend = _byte_level_bpe(metadata)
    elif kind == "llama":
        backend = _sentencepiece_bpe(metadata)
    else:
        raise ModelNotSupported(
            f"GGUF tokenizer model {kind!r} is not supported (gpt2 and llama are); "
            "give tokenizer=... or set skip_tokenizer_init=True"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    _add_special_tokens(backend, tokens, metadata.get("tokenizer.ggml.token_type"))
    bos, eos = (_token_of(metadata, tokens, name) for name in ("bos", "eos"))
    _add_bos_eos(backend, metadata, bos, eos)
    return Tokenizer(backend, bos_token=bos, eos_token=eos, chat_template=metadata.get("tokenizer.chat_template"))


def _byte_level_bpe(metadata: dict[str, Any]) -> Backend:
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    # a merge is two tokens and a space; a token itself never holds a plain space
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in metadata["tokenizer.ggml.merges"])]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    backend.pre_tokenizer = _pre_tokenizer(pre)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)  # after GPT-2's cuts
    if pre in _CUTS:
        return _cut_then_bytes(_CUTS[pre])
    if pre in _SINGLE_DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), to_bytes])
    if pre == "falcon":
        digits = [pre_tokenizers.Digits(), pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated")]
        return pre_tokenizers.Sequence([pre_tokenizers.Punctuation(behavior="contiguous"), to_bytes, *digits])
    known = sorted({*_CUTS, *_SINGLE_DIGITS, "falcon"})
    raise ModelNotSupported(
        f"GGUF pre-tokenizer {pre!r} is not supported; supported: {', '.join(known)}. "
        "Give tokenizer=... or set skip_tokenizer_init=True"
    )


def _cut_then_bytes(pattern: str | None) -> pre_tokenizers.PreTokenizer:
    if pattern is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _sentencepiece_bpe(metadata: dict[str, Any]) -> Backend:
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=_merges_of(vocab, scores),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    to_pieces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "\u2581")]
    to_text: list[decoders.Decoder] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        to_pieces.insert(0, normalizers.Prepend("\u2581"))
        to_text.append(decoders.Strip(content=" ", left=1, right=0))
    backend.normalizer = normalizers.Sequence(to_pieces)
    backend.decoder = decoders.Sequence(to_text)
    return backend


def _merges_of(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose union scores best; BPE wants those pairs in order."""
    ranked = []
    for token, token_id in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[token_id], vocab[left], vocab[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _add_special_tokens(backend: Backend, tokens: list[str], types: list[int] | None) -> None:
    added = []
    for token, kind in zip(tokens, types or [], strict=False):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            added.append(AddedToken(token, special=kind != _USER_DEFINED, normalized=False))
    backend.add_tokens(added)


def _token_of(metadata: dict[str, Any], tokens: list[str], name: str) -> str | None:
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return None if token_id is None else tokens[token_id]


def _add_bos_eos(backend: Backend, metadata: dict[str, Any], bos: str | None, eos: str | None) -> None:
    """Frame encoded text as the file asks; SentencePiece, Llama 3 and Nemo models default to BOS."""
    bos_default = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS
    first = bos if metadata.get("tokenizer.ggml.add_bos_token", bos_default) else None
    last = eos if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    frame = [token for token in (first, last) if token is not None]
    if frame:
        single = [*([first] if first else []), "$A", *([last] if last else [])]
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(frame)]
        )
