"""Sampling parameters of requests that bring none, and the tokens that end texts, by vLLM's rules."""

from __future__ import annotations

import json
import shutil

import pytest

from nanovllm import LLM, ConfigError, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.engine.generation_config import generation_defaults
from nanovllm.weights.checkpoint import open_checkpoint

RECOMMENDED = {"do_sample": False, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1}
RECOMMENDED |= {"repetition_penalty": 1.1, "max_new_tokens": 7, "eos_token_id": [257, 5], "unknown": "kept out"}
EXPECTED = SamplingParams(
    temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.1, max_tokens=7
)  # do_sample is not vLLM's business


@pytest.fixture
def path(chat_model, tmp_path):
    shutil.copytree(chat_model, tmp_path / "model")
    write(tmp_path / "model", RECOMMENDED)
    return tmp_path / "model"


def write(folder, values):
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(values))


def defaults(path, **options):
    found = generation_defaults(EngineConfig(str(path), **options), open_checkpoint(path))
    return SamplingParams(**found.sampling), found.eos_ids


def test_auto_is_the_checkpoints_own_file(path):
    assert defaults(path) == (EXPECTED, [257, 5])


def test_a_checkpoint_without_the_file_gives_neutral_defaults(path):
    (path / "generation_config.json").unlink()
    assert defaults(path) == (SamplingParams(), [])


def test_vllm_is_neutral_but_keeps_the_ends_of_texts(path):
    assert defaults(path, generation_config="vllm") == (SamplingParams(), [257, 5])


def test_a_folder_stands_for_the_checkpoints_file(path, tmp_path):
    write(tmp_path / "other", {"top_p": 0.5, "eos_token_id": 9, "temperature": None})
    assert defaults(path, generation_config=str(tmp_path / "other")) == (SamplingParams(top_p=0.5), [9])
    with pytest.raises(ConfigError, match=r"generation_config='/nowhere'.*/nowhere/generation_config.json"):
        defaults(path, generation_config="/nowhere")


def test_overrides_go_before_the_file(path):
    found, _ = defaults(path, override_generation_config={"temperature": 0.1, "presence_penalty": 0.5})
    assert (found.temperature, found.presence_penalty, found.top_k) == (0.1, 0.5, 20)
    neutral, _ = defaults(path, generation_config="vllm", override_generation_config={"max_new_tokens": 3})
    assert neutral == SamplingParams(max_tokens=3)
    with pytest.raises(ConfigError, match=r"override_generation_config: 'max_tokens' is not one of .*max_new_tokens"):
        defaults(path, override_generation_config={"max_tokens": 3})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "warm"),
        ("temperature", -1),
        ("top_k", 1.5),
        ("top_p", 0),
        ("max_new_tokens", 0),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [1, None]),
        ("eos_token_id", True),
    ],
)
def test_bad_values_name_the_file(path, key, value):
    write(path, {key: value})
    with pytest.raises(ConfigError, match=rf"{path}/generation_config.json: {key}"):
        defaults(path)


def test_bad_overrides_name_the_option(path):
    with pytest.raises(ConfigError, match=r"override_generation_config: top_k=-7"):
        defaults(path, override_generation_config={"top_k": -7})


def test_requests_without_parameters_use_the_defaults_and_explicit_ones_are_taken_as_they_are(path):
    options = {"override_generation_config": {"temperature": 0.0}}
    with LLM(str(path), **options) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(**llm.engine.sampling_defaults)
        assert llm.get_default_sampling_params().greedy
        greedy = llm.generate("hi", llm.get_default_sampling_params(), use_tqdm=False)[0]
        assert llm.generate("hi", use_tqdm=False)[0]["token_ids"] == greedy["token_ids"]
        assert len(greedy["token_ids"]) <= 7
        message = [{"role": "user", "content": "hi"}]
        chat = llm.chat(message, llm.get_default_sampling_params(), use_tqdm=False)[0]
        assert llm.chat(message, use_tqdm=False)[0]["token_ids"] == chat["token_ids"]
        assert "".join(llm.stream("hi")) == greedy["text"]
        explicit = llm.generate("hi", SamplingParams(ignore_eos=True), use_tqdm=False)[0]
        assert len(explicit["token_ids"]) == 16


def test_the_files_ends_of_texts_end_texts(path):
    with LLM(str(path)) as llm:
        first = llm.generate("hi", SamplingParams(temperature=0, ignore_eos=True), use_tqdm=False)[0]["token_ids"]
    write(path, {"eos_token_id": [257, first[2]]})
    for option in ("auto", "vllm"):
        with LLM(str(path), generation_config=option) as llm:
            output = llm.generate("hi", SamplingParams(temperature=0), use_tqdm=False)[0].outputs[0]
        assert output.finish_reason == "stop"
        assert len(output.token_ids) <= 3


def test_an_end_beyond_the_vocabulary_is_no_end(tiny_model):
    """min_tokens forbade it in a row of logits that was too short."""
    params = SamplingParams(max_tokens=4, min_tokens=3)
    with LLM(str(tiny_model("gpt2")), device="cpu", skip_tokenizer_init=True, kvcache_memory="8MiB") as llm:
        assert len(llm.generate([[5, 6]], params, use_tqdm=False)[0].outputs[0].token_ids) == 4
