"""Options that are made from dataclasses."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from nanovllm.cli.main import build_parser
from nanovllm.cli.options import SAMPLING_NAMES, add_engine_options, engine_options, field_help, sampling_options
from nanovllm.config import EngineConfig
from nanovllm.sampling_params import SamplingParams


def parse(*argv: str) -> argparse.Namespace:
    return build_parser().parse_args(["complete", "-m", "x", *argv])


def test_every_field_of_engine_config_is_an_option_with_help():
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    options = {action.dest.removeprefix("engine_"): action for action in parser._actions}
    for field in dataclasses.fields(EngineConfig):
        if field.name != "model":
            assert len(options[field.name].help) > 10, field.name
    assert set(field_help(EngineConfig)) == {f.name for f in dataclasses.fields(EngineConfig)}


def test_sampling_options_have_help():
    assert set(SAMPLING_NAMES) <= set(field_help(SamplingParams))


def test_what_is_not_given_is_left_to_the_dataclass():
    assert engine_options(parse()) == {}
    assert sampling_options(parse()) == {}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--max-model-len 2048", {"max_model_len": 2048}),
        ("--no-enable-prefix-caching", {"enable_prefix_caching": False}),
        ("--enable-prefix-caching", {"enable_prefix_caching": True}),
        ("--kvcache-memory 4GiB", {"kvcache_memory": "4GiB"}),
        ("--kvcache-memory 123456", {"kvcache_memory": "123456"}),
        ("--gpu-memory-utilization 0.5", {"gpu_memory_utilization": 0.5}),
        ("--engine-seed 7", {"seed": 7}),
        ("--engine-seed none", {"seed": None}),
        ("--dtype bfloat16 --revision none", {"dtype": "bfloat16", "revision": "none"}),
        ('--override-generation-config {"top_k":3}', {"override_generation_config": {"top_k": 3}}),
    ],
)
def test_engine_options(argv, expected):
    found = engine_options(parse(*argv.split()))
    assert found == expected
    EngineConfig("m", **found)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--max-tokens none --temperature 0 --top-k 5", {"max_tokens": None, "temperature": 0.0, "top_k": 5}),
        ("--stop a --stop b --stop-token-ids 3", {"stop": ["a", "b"], "stop_token_ids": [3]}),
        ("--seed 7 --engine-seed 8", {"seed": 7}),
        ("--n 2 --ignore-eos --bad-words x", {"n": 2, "ignore_eos": True, "bad_words": ["x"]}),
    ],
)
def test_sampling_options(argv, expected):
    found = sampling_options(parse(*argv.split()))
    assert found == expected
    SamplingParams(**found)


@pytest.mark.parametrize(
    "argv",
    [
        "--max-model-len many",
        "--engine-seed x",
        "--dtype float64",
        "--override-generation-config {",
        "--override-generation-config [1]",
        "--temperature warm",
    ],
)
def test_values_that_do_not_read_are_usage_errors_that_name_the_option(argv, capsys):
    with pytest.raises(SystemExit):
        parse(*argv.split())
    assert f"argument {argv.split()[0]}: " in capsys.readouterr().err


def test_field_help_joins_lines_and_shares_text_between_names():
    class Documented:
        """About it.

        a: the first
            line, and the second.
        b, c: both.

        A paragraph that belongs to nobody: neither this.
        """

    assert field_help(Documented) == {"a": "the first line, and the second.", "b": "both.", "c": "both."}
