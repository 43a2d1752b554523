"""Published quantised checkpoints compute, bit for bit, as plain ones that hold the weights they stand for."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed.families import GREEDY, PROMPTS, SCARCE
from gguf_converter import FAMILIES as GGUF_FAMILIES
from kernels import native_library
from published import FORMATS, SCHEMES, awq, fp8, gptq, integers, packed, publish, publish_all
from test_quantized_models import PEAK, planned
from tiny_models import make_tiny_model

from nanovllm import LLM, ConfigError
from nanovllm.cli.main import main
from nanovllm.cli.parity import all_logits
from nanovllm.errors import ModelNotSupported, WeightError

native_library()
TOKENS = np.random.default_rng(1).integers(2, 128, 40).tolist()
OPTIONS = {"skip_tokenizer_init": True, "kvcache_memory": "8MiB", "device": "cpu", "enforce_eager": True}
SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
ACT_ORDER = SCHEMES["gptq-4-act-order"]
TORCH = {"kernels": "torch", "attention_backend": "cpu"}
FAMILIES = GGUF_FAMILIES | {  # whose sizes are whole groups of 32 columns
    "qwen3-moe": {**SIZES, "moe_intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 64},
    "gpt-neox": {**SIZES, "hidden_size": 128},
    "mpt": {"d_model": 64, "n_heads": 4},
}
METHODS = {
    "awq": awq(32),
    "gptq": gptq(4, 32, symmetric=False),
    "compressed-tensors": integers(),
    "fp8": fp8((128, 128)),
}
QUICK = {  # each with what is particular to it: norms of heads, experts, a tied head, fused and regrouped rows
    ("qwen3", "fp8"),
    ("qwen3-moe", "awq"),
    ("llama3", "compressed-tensors"),
    ("falcon-40b", "gptq"),
    ("granite-hybrid", "awq"),
}


def logits(path: Path, **options) -> torch.Tensor:
    with LLM(str(path), **{**OPTIONS, **options}, enable_prefix_caching=False) as llm:
        return all_logits(llm, TOKENS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"), **SIZES)


@pytest.fixture
def published(llama, tmp_path):
    numbers = itertools.count()
    return lambda how: publish(llama, tmp_path / str(next(numbers)), how)[0]


def assert_same(found: torch.Tensor, expected: torch.Tensor, scheme: str) -> None:
    """Sums over columns in another order have other bits."""
    if "act-order" in scheme:
        torch.testing.assert_close(found, expected, rtol=0, atol=0.03)
    else:
        assert torch.equal(found, expected)


def test_what_is_written_for_benchmarks_is_read(llama, tmp_path):
    publish_all(str(llama), str(tmp_path))
    for name in FORMATS:
        assert logits(tmp_path / name).isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_the_weights_that_it_stands_for(llama, tmp_path, scheme):
    quantised, plain = publish(llama, tmp_path, SCHEMES[scheme])
    expected = logits(plain)
    assert_same(logits(quantised), expected, scheme)
    assert torch.equal(logits(quantised, quantization="dequantize"), expected)
    assert torch.equal(logits(quantised, **TORCH), logits(plain, **TORCH))


@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow)
        for pair in itertools.product(FAMILIES, METHODS)
        if pair[0] != "gpt2"
    ],
)
def test_every_family_by_every_method(tmp_path, family, method):
    quantised, plain = publish(make_tiny_model(family, tmp_path, **FAMILIES[family]), tmp_path, METHODS[method])
    assert torch.equal(logits(quantised), logits(plain))


def test_experts_have_their_own_orders_of_columns(tmp_path, level):
    quantised, plain = publish(
        make_tiny_model("mixtral", tmp_path, **SIZES, num_key_value_heads=2), tmp_path, ACT_ORDER
    )
    assert_same(logits(quantised), logits(plain), "act-order")


def test_gpt2s_layers_are_not_read(tmp_path):
    """Their weights are [in, out] where they are not quantised."""
    write = awq(32).write
    how = awq(32)._replace(write=lambda module, weight: write(module, weight.T), modules=r".*c_\w+")
    with pytest.raises(WeightError, match="misshapen"):
        logits(publish(make_tiny_model("gpt2", tmp_path, **FAMILIES["gpt2"]), tmp_path, how)[0])


def test_bits_are_the_requests_own(published, capsys):
    """With an order of columns, as an input is copied in another way then."""
    options = ("--max-tokens", "20", "--kernels", "native", "--attention-backend", "native")
    status = main(["verify", str(published(ACT_ORDER)), *options])
    out = capsys.readouterr().out
    assert status == 0, out
    assert " preempted)" in out


@pytest.mark.parametrize("scheme", ["awq-128", "gptq-4-act-order", "fp8-block"])
def test_steps_are_recorded(published, scheme):
    with LLM(str(published(SCHEMES[scheme])), **OPTIONS | {"enforce_eager": False}, kernels="native") as llm:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert llm.engine._executor._runner._graphs is not None


# --- options -------------------------------------------------------------------------------------------


def test_the_method_may_be_named(published):
    path = published(awq(128))
    assert torch.equal(logits(path, quantization="awq"), logits(path))
    for asked, message in (
        ("gptq", "'gptq': the checkpoint is quantised by 'awq'"),
        ("int8", "'int8': the checkpoint is quantised by 'awq', and what codes have lost"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(str(path), **OPTIONS, quantization=asked)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_transformers_modules_take_none(published, dtype):
    with pytest.raises(ModelNotSupported, match="transformers' modules: use an unquantised checkpoint"):
        LLM(str(published(awq(128))), **OPTIONS, model_impl="transformers", dtype=dtype)


def test_it_is_widened_in_float32(llama, tmp_path):
    quantised, plain = publish(llama, tmp_path, SCHEMES["gptq-8-v2-head"])
    assert torch.equal(logits(quantised, dtype="float32"), logits(plain, dtype="float32"))


def test_scales_of_keys_and_values_are_left_out_with_a_notice(llama, tmp_path, caplog):
    how = fp8((128, 128))

    def write(module, weight):
        tensors, meant = how.write(module, weight)
        return (tensors | {"k_scale": torch.tensor(0.1)} if module.endswith("k_proj") else tensors), meant

    quantised, plain = publish(llama, tmp_path, how._replace(write=write))
    with caplog.at_level(logging.WARNING):
        found = logits(quantised)
    assert "2 scales of keys and values are not used: these stay in the model's dtype" in caplog.messages
    assert torch.equal(found, logits(plain))


# --- memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "gptq-4-act-orders"])
def test_a_plan_is_what_is_allocated(published, scheme):
    path = published(SCHEMES[scheme])
    with LLM(str(path), **OPTIONS) as llm:
        (weights,) = llm.apply_model(lambda m: {id(p): p.numel() * p.itemsize for p in m.parameters()})
    assert planned(path) == sum(weights.values())


def test_a_plan_needs_the_headers_of_the_weights(published, capsys):
    """It told to fetch again what it had not asked for."""
    path = published(awq(128))
    assert main(["plan", str(path), "--memory", "1GiB"]) == 0
    for file in path.glob("*.safetensors"):
        file.unlink()
    assert main(["plan", str(path / "config.json"), "--quantization", "dequantize", "--memory", "1GiB"]) == 0
    assert main(["plan", str(path / "config.json"), "--memory", "1GiB"]) == 2
    assert "headers of their files: give a folder that has these, or plan for 'dequantize'" in capsys.readouterr().err


@pytest.mark.parametrize(("how", "bits"), [(awq(128), 4.5), (gptq(8, 128), 8.5), (fp8((128, 128)), 8.25)])
def test_weights_take_what_codes_and_scales_do(published, how, bits):
    path = published(how)
    whole, embedding, norms = 2 * (4 * 256 * 256 + 3 * 256 * 384), 2 * 128 * 256 * 2, 5 * 256 * 4
    linears = whole - 2 * 2 * 128 * 256  # two of four key and value heads
    assert planned(path) == linears * bits / 8 + embedding + norms


@pytest.mark.slow
def test_no_more_than_pieces_are_unpacked_while_loading(tmp_path):
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, "num_attention_heads": 12}
    quantised, plain = publish(make_tiny_model("llama", tmp_path, **sizes), tmp_path, packed(4, 128))

    def peak(path: Path) -> float:
        command = [sys.executable, "-c", PEAK, str(path), ""]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024  # MiB

    assert peak(plain) - peak(quantised) > 60  # of 100 that the linear layers have in bfloat16


# --- ranks ----------------------------------------------------------------------------------------------


def generated(path: Path, ranks: int):
    with LLM(str(path), **SCARCE, tensor_parallel_size=ranks) as llm:
        return [o.outputs[0] for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


@pytest.mark.parametrize(
    "scheme",
    ["gptq-4-act-order", *(pytest.param(s, marks=pytest.mark.slow) for s in ("awq-64", "w4a16", "w8a8", "fp8-block"))],
)
def test_two_ranks_have_the_weights_of_one(tmp_path, scheme):
    """Whose columns are parted where groups end; those in another order are widened first."""
    model = make_tiny_model("llama", tmp_path, **SIZES | {"intermediate_size": 512})
    path, _ = publish(model, tmp_path, SCHEMES[scheme])
    assert_alike(*(generated(path, n) for n in (1, 2)))


def assert_alike(one: list, two: list) -> None:
    for alone, shared in zip(one, two, strict=True):
        assert alone.token_ids == shared.token_ids
        pairs = zip(alone.token_ids, alone.logprobs, shared.logprobs, strict=True)
        assert max(abs(a[t].logprob - b[t].logprob) for t, a, b in pairs) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_have_the_experts_of_one(tmp_path, method):
    sizes = SIZES | {"intermediate_size": 512, "num_key_value_heads": 2}
    path, _ = publish(make_tiny_model("mixtral", tmp_path, **sizes), tmp_path, METHODS[method])
    assert_alike(*(generated(path, n) for n in (1, 2)))


def test_ranks_do_not_part_groups(published):
    with pytest.raises(ConfigError, match="columns of a projection in groups of 128: 384 does not divide by"):
        planned(published(awq(128)), 2)
    planned(published(SCHEMES["w8a8"]), 2)  # which has none
