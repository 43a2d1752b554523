"""`nanovllm models`."""

from __future__ import annotations

import pytest

from nanovllm.cli.main import main
from nanovllm.models.registry import supported_architectures
from nanovllm.weights.hub import ALIASES


@pytest.fixture
def listed(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "ours"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def run() -> str:
        assert main(["models"]) == 0
        return capsys.readouterr().out

    return run


def test_every_architecture_is_listed_with_what_it_is(listed):
    out = listed()
    assert all(name in out for name in supported_architectures())
    assert "LlamaForCausalLM" in out and "Llama 2 and 3" in out


def test_an_alias_is_cached_or_not(listed, tmp_path):
    assert f"{ALIASES['smollm2-135m'].requirement} (fetched on first use)" in listed()
    (tmp_path / "ours" / "smollm2-135m").mkdir(parents=True)
    (tmp_path / "ours" / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(bytes(3 * 2**19))
    assert "(cached, 1.5 MiB, " in listed()


def test_repositories_in_the_hubs_cache(listed, tmp_path):
    assert "In the Hub's cache:\n  none" in listed()
    snapshot = tmp_path / "hub" / "models--someone--something" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes(bytes(2048))
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert "someone/something  2.0 KiB, " in listed()


def test_an_architecture_of_another_package(listed, monkeypatch):
    monkeypatch.setattr("nanovllm.cli.models.supported_architectures", lambda: {"OtherForCausalLM": "other.place"})
    assert "OtherForCausalLM  registered: other.place" in listed()
