"""`nanovllm plan`."""

from __future__ import annotations

import json
import re

import pytest

from nanovllm import LLM
from nanovllm.cli.main import main
from nanovllm.errors import ConfigError

MIB = 2**20


@pytest.fixture
def plan(capsys):
    def run(*argv: str) -> tuple[int, str]:
        status = main(["plan", *map(str, argv)])
        return status, capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def config_only(tmp_path_factory):
    """9.5 MiB of weights in fp32, and no file with any."""
    path = tmp_path_factory.mktemp("plan")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 1024}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 4096}
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **sizes}))
    return path


def test_a_directory_and_its_config_give_the_same(plan, config_only):
    by_directory = plan(config_only, "--memory", "64MiB")
    assert by_directory == plan(config_only / "config.json", "--memory", "64MiB")
    status, out = by_directory
    assert status == 0
    assert out.startswith("LlamaForCausalLM, float32 on cpu\nweights            9.5 MiB (9,968,640 bytes)\n")
    assert "6.0 KiB a token" in out


def test_the_default_is_the_memory_that_is_free(plan, config_only, monkeypatch):
    monkeypatch.setattr("nanovllm.cli.plan.free_host_memory", lambda: 30 * MIB)
    status, out = plan(config_only)
    assert status == 0
    assert "memory             30.0 MiB free here" in out


def test_the_engine_takes_what_is_said_to_fit_and_no_more(plan, tiny_model):
    path = tiny_model("llama")
    status, out = plan(path, "--memory", "700KiB", "--max-model-len", "512")
    assert status == 1
    longest = int(re.search(r"--max-model-len (\d+)", out)[1])
    least = int(re.search(r"memory of at least (\d+) MiB", out)[1])
    assert plan(path, "--memory", "700KiB", "--max-model-len", longest)[0] == 0
    assert plan(path, "--memory", f"{least}MiB", "--max-model-len", "512")[0] == 0
    weights = sum(int(n.replace(",", "")) for n in re.findall(r"weights .*\(([\d,]+) bytes", out))
    left = 700 * 1024 - weights - 512 * 16 * 2 * 2  # cos and sin of 8 angles in fp32
    with LLM(str(path), skip_tokenizer_init=True, max_model_len=longest, kvcache_memory=left):
        pass
    with pytest.raises(ConfigError, match="does not fit"):
        LLM(str(path), skip_tokenizer_init=True, max_model_len=longest + 1, kvcache_memory=left)


def test_changes_that_would_help_are_tried(plan, config_only):
    status, out = plan(config_only, "--memory", "9MiB")
    assert status == 1
    assert "does not fit: the weights take" in out
    assert "--dtype bfloat16" in out
    assert "--tp 2" in out
    assert plan(config_only, "--memory", "9MiB", "--dtype", "bfloat16")[0] == 0
    assert plan(config_only, "--memory", "9MiB", "--tp", "2")[0] == 0
    status, out = plan(config_only, "--memory", "1MiB")
    assert status == 1
    assert "--dtype" not in out
    assert "--tp 16" not in out  # there are 8 heads


def test_a_lowered_max_model_len_is_said(plan, config_only):
    status, out = plan(config_only, "--memory", "20MiB")
    assert status == 0
    assert "max_model_len is lowered from the model's 4,096" in out


def test_ranks(plan, config_only, capsys):
    status, out = plan(config_only, "--memory", "64MiB", "--tp", "4")
    assert status == 0
    assert "on each of 4 ranks" in out
    assert "whole on each    RMSNorm 7.0 KiB" in out
    assert "1.5 KiB a token" in out
    assert main(["plan", str(config_only), "--tp", "3"]) == 2
    assert (
        "query heads: 8 does not divide by tensor_parallel_size=3; sizes that can: 1, 2, 4, 8"
        in capsys.readouterr().err
    )


def test_recurrent_states_and_windows(plan, tiny_model):
    status, out = plan(tiny_model("granite-hybrid"), "--memory", "64MiB", "--tp", "1")
    assert status == 0
    assert "recurrent state" in out
    status, out = plan(tiny_model("mistral-window"), "--memory", "64MiB")
    assert status == 0
    assert "of which a sequence keeps the last 20" in out


def test_a_gpu_that_is_not_here(plan, config_only, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, out = plan(config_only, "--device", "cuda", "--memory", "64MiB")
    assert status == 0
    assert "on cuda" in out
    assert "--kvcache-memory" not in out
    assert main(["plan", str(config_only), "--device", "cuda"]) == 2
    assert "--memory" in capsys.readouterr().err


def test_a_repository_is_asked_for_its_config_alone(plan, config_only, monkeypatch):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(config_only)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert plan("someone/something", "--revision", "v1", "--memory", "64MiB")[0] == 0
    assert asked == [("someone/something", "v1", ["config.json"])]
