"""`nanovllm eval`: against torch's own arithmetic on the same logits."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from kernels import native_library

from nanovllm import LLM
from nanovllm.cli.main import main
from nanovllm.cli.parity import all_logits

native_library()


def evaluated(capsys, *argv: str) -> tuple[float, float, float, float]:
    """Perplexity, that in float32, KL, share of equal likeliest tokens in percent."""
    assert main(["eval", *argv]) == 0
    out = capsys.readouterr().out
    found = re.search(r"perplexity +([\d.]+), in float32 ([\d.]+)\nKL +(\S+) nats.*\nsame likeliest +([\d.]+)%", out)
    assert found, out
    return tuple(map(float, found.groups()))


def logits(path, tokens, **options) -> torch.Tensor:
    with LLM(str(path), enforce_eager=True, enable_prefix_caching=False, max_model_len=128, **options) as llm:
        return all_logits(llm, tokens).double().log_softmax(-1)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_of_a_text(chat_model, tmp_path, capsys, scheme):
    text = tmp_path / "text"
    text.write_text("In the beginning there was a text of no meaning, and it was short.")
    tokens = list(text.read_bytes())
    found = evaluated(capsys, str(chat_model), "--text", str(text), "--quantization", scheme)
    exact, tried = logits(chat_model, tokens, dtype="float32"), logits(chat_model, tokens, quantization=scheme)
    following = torch.tensor(tokens[1:])[:, None]
    perplexities = [math.exp(-x[:-1].gather(1, following).mean()) for x in (tried, exact)]
    kl = (exact.exp() * (exact - tried)).sum(-1).mean().item()
    same = (exact.argmax(-1) == tried.argmax(-1)).double().mean().item()
    assert found == pytest.approx((*perplexities, kl, 100 * same), rel=0.01)


def test_of_what_the_model_writes_itself(tiny_model, capsys):
    """In float32 there is nothing to find."""
    path = str(tiny_model("granite-hybrid"))
    perplexity, exact, kl, same = evaluated(capsys, path, "--dtype", "float32", "--tokens", "200")
    assert perplexity == exact < 128 and kl < 1e-12 and same == 100
    found = [evaluated(capsys, path, "--tokens", "200", "--quantization", scheme)[2] for scheme in ("int8", "int4")]
    assert 0 < found[0] < found[1]


@pytest.mark.parametrize(("asked", "taken"), [(2, 2), (100, 100), (129, 128), (200, 200)])
def test_the_model_writes_no_more_than_it_is_asked_for(tiny_model, capsys, asked, taken):
    """It wrote whole texts of 128 tokens; a text of a single one has nothing to compare."""
    assert main(["eval", str(tiny_model("llama")), "--tokens", str(asked)]) == 0
    assert capsys.readouterr().out.startswith(f"{taken} tokens, ")


def test_a_single_token_is_refused(tiny_model, capsys):
    assert main(["eval", str(tiny_model("llama")), "--tokens", "1"]) == 2
    assert "--tokens 1: of less than two tokens none follows another" in capsys.readouterr().err


def test_a_text_without_tokens(chat_model, tmp_path, capsys):
    (tmp_path / "text").write_text("a")
    assert main(["eval", str(chat_model), "--text", str(tmp_path / "text")]) == 2
    assert "--text holds less than two tokens" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "limit"),
    [
        (["--quantization", "dequantize"], 3e-4),
        ([], 3e-4),
        (["--quantization", "int4"], 4e-4),  # the file's weights are of this form, but the head
        (["--quantization", "int8"], 2e-3),
        (["--kv-cache-dtype", "int8"], 2e-3),
    ],
)
def test_smollm2_reads_a_book(smollm2_path, capsys, options, limit):
    """The beginning of Alice's Adventures in Wonderland (Lewis Carroll, 1865). docs/quantization.md has the numbers."""
    text = Path(__file__).with_name("alice.txt")
    perplexity, exact, kl, same = evaluated(capsys, str(smollm2_path), "--text", str(text), *options)
    assert 20 < exact < 35 and abs(perplexity / exact - 1) < 0.01 and kl < limit and same > 96
