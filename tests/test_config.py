"""EngineConfig: what it refuses and what `resolve` fills in."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.config import EngineConfig, parse_bytes
from nanovllm.errors import ConfigError


def resolve(*, checkpoint_dtype="bfloat16", max_positions=4096, cuda=False, **options) -> EngineConfig:
    config = EngineConfig("m", **options)
    return config.resolve(checkpoint_dtype=checkpoint_dtype, max_positions=max_positions, cuda=cuda)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("max_modellen", "max_model_len"),
        ("max_num_sequences", "max_num_seqs"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
        ("block_size", "kvcache_block_size"),
        ("tensor_parallel", "tensor_parallel_size"),
    ],
)
def test_an_unknown_option_suggests_the_nearest(wrong, right):
    with pytest.raises(ConfigError, match=f"{wrong!r}.*did you mean {right!r}"):
        EngineConfig.from_options("m", {wrong: 1})


def test_an_option_like_no_other_lists_them_all():
    with pytest.raises(ConfigError, match=r"'zzz'.*max_model_len.*kvcache_block_size"):
        EngineConfig.from_options("m", {"zzz": 1})


def test_from_options_passes_values_on():
    config = EngineConfig.from_options("m", {"max_num_seqs": 3, "dtype": "float32"})
    assert (config.model, config.max_num_seqs, config.dtype) == ("m", 3, "float32")


COUNTS = [0, -1, 1.5, "16", True]
REFUSED = {
    "model": ["", None, 5],
    "load_format": ["bin", None],
    "dtype": ["float64", "half", None],
    "device": ["cuda:0", "tpu"],
    "attention_backend": ["flashinfer", None],
    "kv_cache_dtype": ["int4", "fp8_e5m2", None],
    "scheduling_policy": ["lifo"],
    "seed": [-1, 1.5, "0", True, 2**64],
    "max_model_len": COUNTS,
    "max_num_batched_tokens": [*COUNTS, 255],
    "max_num_seqs": [*COUNTS, None],
    "kvcache_block_size": [0, 4, 12, 24, 16.0, "16", None, True],
    "num_kvcache_blocks": COUNTS,
    "kvcache_memory": [0, -1, 1.5, "", "lots", "-1GiB", "4 TiB", "0", True],
    "gpu_memory_utilization": [0, -0.5, 1.1, float("nan"), "0.9", None, True],
    "tensor_parallel_size": COUNTS,
    "executor": ["uni", "processes", None],
    "worker_timeout": [0, -1, "60", None, True, float("nan"), float("inf")],
    "trust_remote_code": [True, "no"],
    "enforce_eager": ["yes", None, 1],
    "enable_prefix_caching": ["no", None, 0],
    "skip_tokenizer_init": ["no", 1],
    "generation_config": ["", None, 5],
    "override_generation_config": [[], "{}", 1],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_bad_values_are_config_errors_that_name_the_option(name, value):
    with pytest.raises(ConfigError, match=name):
        EngineConfig(**{"model": "m", name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kvcache_block_size", 8),
        ("kvcache_block_size", 256),
        ("gpu_memory_utilization", 1),
        ("max_num_batched_tokens", 256),
        ("kvcache_memory", "4GiB"),
        ("kvcache_memory", 10**9),
        ("seed", None),
        ("seed", 2**64 - 1),
    ],
)
def test_good_values_are_kept(name, value):
    assert getattr(EngineConfig("m", **{name: value}), name) == value


def test_the_budget_must_hold_a_token_for_every_sequence():
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens=7.*max_num_seqs=8"):
        EngineConfig("m", max_num_batched_tokens=7, max_num_seqs=8)
    EngineConfig("m", max_num_batched_tokens=8, max_num_seqs=8)


def test_memory_and_number_of_pages_exclude_each_other():
    with pytest.raises(ConfigError, match=r"kvcache_memory or num_kvcache_blocks"):
        EngineConfig("m", kvcache_memory="1GiB", num_kvcache_blocks=10)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig("m").dtype = "float32"


@pytest.mark.parametrize(
    ("asked", "cuda", "device"),
    [("auto", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_resolve_device(asked, cuda, device):
    assert resolve(device=asked, cuda=cuda).device == device


@pytest.mark.parametrize(
    ("options", "cuda", "ahead"),
    [
        ({}, True, True),
        ({"async_scheduling": False}, True, False),
        ({}, False, False),
        ({"executor": "mp"}, False, True),
        ({"async_scheduling": True}, False, True),
    ],
    ids=str,
)
def test_steps_are_planned_ahead_where_the_host_would_wait(options, cuda, ahead):
    config = EngineConfig("m", **options).resolve(checkpoint_dtype="bfloat16", max_positions=64, cuda=cuda)
    assert config.async_scheduling is ahead


def test_cuda_without_a_device_is_refused():
    with pytest.raises(ConfigError, match="device='cuda'"):
        resolve(device="cuda")
    assert resolve(device="cuda", executor="ray").device == "cuda"  # of other hosts


def test_kvcache_memory_is_for_the_cpu():
    assert resolve(kvcache_memory="1GiB").kvcache_memory == "1GiB"
    with pytest.raises(ConfigError, match=r"kvcache_memory.*gpu_memory_utilization"):
        resolve(kvcache_memory="1GiB", cuda=True)


@pytest.mark.parametrize(
    ("asked", "checkpoint", "cuda", "dtype"),
    [
        ("auto", "float32", False, "float32"),
        ("auto", "float32", True, "float32"),
        ("auto", "float16", False, "bfloat16"),
        ("auto", "float16", True, "float16"),
        ("auto", "bfloat16", False, "bfloat16"),
        ("auto", "bfloat16", True, "bfloat16"),
        ("float32", "bfloat16", False, "float32"),
        ("float16", "float32", False, "float16"),
    ],
)
def test_resolve_dtype(asked, checkpoint, cuda, dtype):
    assert resolve(dtype=asked, checkpoint_dtype=checkpoint, cuda=cuda).dtype == dtype


@pytest.mark.parametrize(
    ("asked", "cuda", "options", "resolved"),
    [
        ("auto", True, {}, "auto"),
        ("int8", False, {}, "int8"),
        ("int8", False, {"attention_backend": "native"}, "int8"),
        ("fp8", True, {}, "fp8"),
        ("fp8_e4m3", True, {"attention_backend": "triton"}, "fp8"),
        ("fp8", False, {"attention_backend": "reference"}, "fp8"),
        ("int8", True, {}, "device='cpu'; on cuda set 'fp8'"),
        ("fp8", False, {}, "device='cuda'; on cpu set 'int8'"),
        ("int8", False, {"attention_backend": "cpu"}, "set attention_backend='native'"),
        ("fp8", True, {"attention_backend": "flash"}, "set attention_backend='triton'"),
        ("fp8", False, {"attention_backend": "native"}, "device='cuda'; on cpu set 'int8'"),
    ],
)
def test_resolve_kv_cache_dtype(asked, cuda, options, resolved):
    if resolved in ("auto", "int8", "fp8"):
        assert resolve(cuda=cuda, kv_cache_dtype=asked, **options).kv_cache_dtype == resolved
        return
    with pytest.raises(ConfigError, match=f"kv_cache_dtype='{asked}'.*{resolved}"):
        resolve(cuda=cuda, kv_cache_dtype=asked, **options)


def test_resolve_max_model_len():
    assert resolve(max_positions=512).max_model_len == 512
    assert resolve(max_positions=512, max_model_len=512).max_model_len == 512
    assert resolve(max_positions=512, max_model_len=100).max_model_len == 100
    with pytest.raises(ConfigError, match=r"max_model_len=513.*512"):
        resolve(max_positions=512, max_model_len=513)


def test_resolve_token_budget():
    assert resolve().max_num_batched_tokens == 2048
    assert resolve(max_num_seqs=5000).max_num_batched_tokens == 5000
    assert resolve(max_num_batched_tokens=300).max_num_batched_tokens == 300


def test_resolve_ranks():
    assert resolve().tensor_parallel_size == 1
    assert resolve(tensor_parallel_size=3).tensor_parallel_size == 3
    launched = {"checkpoint_dtype": "float32", "max_positions": 64, "cuda": False, "launched": 4}
    assert EngineConfig("m").resolve(**launched).tensor_parallel_size == 1  # torchrun is for others
    assert EngineConfig("m", executor="torchrun").resolve(**launched).tensor_parallel_size == 4
    with pytest.raises(ConfigError, match="torchrun started 4 processes"):
        EngineConfig("m", executor="torchrun", tensor_parallel_size=2).resolve(**launched)


def test_resolve_changes_nothing_else_and_is_stable():
    config = EngineConfig("m", max_num_seqs=7, seed=3, scheduling_policy="priority")
    resolved = config.resolve(checkpoint_dtype="float32", max_positions=64, cuda=False)
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(resolved, f.name)}
    lengths, ranks = {"max_model_len", "max_num_batched_tokens"}, {"tensor_parallel_size", "async_scheduling"}
    assert changed == {"device", "dtype"} | lengths | ranks
    assert resolved.resolve(checkpoint_dtype="float32", max_positions=64, cuda=False) == resolved


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (123, 123),
        ("123", 123),
        ("123B", 123),
        ("512MiB", 512 * 2**20),
        ("4GB", 4 * 10**9),
        ("4g", 4 * 10**9),
        ("4 gib", 4 * 2**30),
        ("1.5KiB", 1536),
        (" 2k ", 2000),
    ],
)
def test_parse_bytes(value, expected):
    assert parse_bytes("x", value) == expected


@given(st.one_of(st.text("0123456789.kKmMgGiIbB -e", max_size=12), st.integers(), st.none(), st.floats()))
def test_parse_bytes_gives_a_positive_number_or_a_config_error(value):
    try:
        size = parse_bytes("x", value)
    except ConfigError:
        return
    assert isinstance(size, int) and size > 0


def test_parse_bytes_of_too_many_digits():
    with pytest.raises(ConfigError):
        parse_bytes("x", "9" * 400)
