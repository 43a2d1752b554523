"""The classic demos: a question to a GPT-2 directory, a chat with a directory of any other family."""

import io

import pytest
import torch
from helpers import byte_tokenizer
from tiny_models import make_chat_model

from nanovllm.cli.main import main

QUESTION = "The capital city of France is"


def greedy_text(path, prompt: list[int], count: int) -> str:
    """What transformers says."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return byte_tokenizer().decode(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "mpt", "falcon-7b"])
def test_complete(family, tmp_path, capsys):
    path = make_chat_model(family, tmp_path)
    options = ["--temperature", "0", "--max-tokens", "12", "--ignore-eos"]
    assert main(["complete", "--model", str(path), QUESTION, *options]) == 0
    expected = greedy_text(path, list(QUESTION.encode()), 12)
    assert capsys.readouterr().out.strip() == expected.strip()


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite", "granite-hybrid", "gemma3", "mixtral"])
def test_chat(family, tmp_path, capsys, monkeypatch):
    path = make_chat_model(family, tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTION + "\n"))
    assert main(["chat", "--model", str(path), "--temperature", "0", "--max-tokens", "12", "--ignore-eos"]) == 0
    prompt = [256, *f"user: {QUESTION}\nbot: ".encode()]
    assert capsys.readouterr().out.strip() == greedy_text(path, prompt, 12).strip()
