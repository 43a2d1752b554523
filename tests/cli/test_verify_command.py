"""`nanovllm verify`: that it sees a bit that changes, in which way of serving, and in which module."""

from __future__ import annotations

import re

import pytest
import torch
from kernels import native_library

from nanovllm.attention.base import select_backend
from nanovllm.cache_spec import PagedKVSpec
from nanovllm.cli.main import main
from nanovllm.cli.row_bits import first_module, same_bits
from nanovllm.engine.runner import model_runner
from nanovllm.layers.embed_head import ParallelLMHead
from nanovllm.layers.mlp import GatedMLP
from nanovllm.models.base import CausalLM

native_library()  # torch's bits do depend
FP32 = select_backend("auto", torch.device("cpu"), [PagedKVSpec(2, 64, torch.float32)], 16)


@pytest.fixture
def verify(capsys):
    def run(*argv: str) -> tuple[int, str]:
        status = main(["verify", *map(str, argv)])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def differing(out: str) -> list[str]:
    """The ways of serving whose line counts a difference."""
    lines = re.findall(r"^ *\d+ +(\d+) +[\d.e-]+  (.*)$", out, re.MULTILINE)
    assert len(lines) == 17
    return [label for count, label in lines if count != "0"]


def test_what_is_exact_passes_and_every_way_was_really_gone(verify, chat_model):
    prompt = "a text that is longer than a page of sixteen tokens"
    status, out = verify(chat_model, "--prompt", prompt, "--prompt", "you", "--max-tokens", "4")
    assert status == 0, out
    assert "every bit is the same in all 17 ways of serving" in out
    assert differing(out) == []
    assert re.search(r"^     8 +0 +0  all together$", out, re.MULTILINE)
    assert re.search(r"^    20 +0 +0  n=3 completions$", out, re.MULTILINE)
    assert re.search(r"^    16 +0 +0  with prefix caching, twice \(48 prompt tokens cached\)$", out, re.MULTILINE)
    assert re.search(r"too few pages \([1-9]\d* preempted\)$", out, re.MULTILINE)
    assert "differ:" not in out


@pytest.mark.parametrize(
    ("place", "name", "harmed", "named"),
    [
        (type(FP32), "forward", lambda args: len(args[-1].seq_lens) > 3, "model.layers.0.self_attn.attn"),
        (GatedMLP, "forward", lambda args: len(args[1]) > 20, "model.layers.0.mlp"),
        (ParallelLMHead, "forward", lambda args: len(args[1]) > 3, "lm_head"),
    ],
)
def test_the_module_that_looks_at_its_company_is_named(verify, tiny_model, monkeypatch, place, name, harmed, named):
    right = getattr(place, name)

    def wrong(*args, **options):
        out = right(*args, **options)
        return torch.nextafter(out, out + 1) if harmed(args) and out.dtype == torch.float32 else out

    monkeypatch.setattr(place, name, wrong)
    status, out = verify(tiny_model("llama"), "--max-tokens", "3")
    assert status == 1
    assert f"first to differ: {named}; its input is the same" in out
    assert re.search(r"bits differ in \d+ of 17 ways", out)
    assert not any(label.startswith("alone") for label in differing(out))
    assert "all together" in differing(out)


def test_logits_that_change_outside_of_modules(verify, tiny_model, monkeypatch):
    right = CausalLM.compute_logits
    monkeypatch.setattr(CausalLM, "compute_logits", lambda self, h: right(self, h) + (len(h) > 3) * 1e-5)
    status, out = verify(tiny_model("llama"), "--max-tokens", "2")
    assert status == 1
    assert "no module differs when it is served again op by op" in out


def test_the_engine_is_left_as_it_was(verify, tiny_model):
    before = model_runner.sample, torch.get_num_threads()
    verify(tiny_model("gpt2"), "--max-tokens", "1")
    assert (model_runner.sample, torch.get_num_threads()) == before


def test_what_is_asked_for_must_be_one_model_with_room_and_a_tokenizer_for_texts(verify, tiny_model):
    assert verify()[0] == 2
    status, out = verify(tiny_model("llama"), "--max-tokens", "500")
    assert status == 2
    assert "602 tokens of 512 positions; lower --max-tokens" in out
    status, out = verify(tiny_model("llama"), "--prompt", "hello")
    assert status == 2
    assert "tokenizer.json" in out


def test_a_random_model_of_a_family(verify):
    status, out = verify("--random", "gpt2", "--max-tokens", "2")
    assert status == 0, out


def test_bits_are_more_than_values():
    zero, nan = torch.tensor([0.0]), torch.tensor([float("nan")])
    assert not same_bits(zero, -zero)
    assert same_bits(nan, nan.clone())


def test_a_row_that_the_reference_lacks_is_no_difference():
    reference = {"l.0.mlp": {(1, 5): [(1, 2)]}, "l.0": {(1, 5): [(None, 3)]}}
    assert first_module(reference, {"l.0.mlp": {(1, 6): [(8, 9)]}, "l.0": {(1, 5): [(7, 3)]}}) is None
    assert first_module(reference, {"l.0.mlp": {(1, 5): [(1, 2), (1, 4)]}}).module == "l.0.mlp"
