"""quantize_activations=True on CPUs: what it costs, whose bits a request has, and who is told that it cannot be had."""

from __future__ import annotations

import re

import pytest
import torch
from distributed.families import GREEDY, PROMPTS
from gguf_converter import Kind, convert
from kernels import at_level, native_library
from published import SCHEMES, publish
from test_quantized_models import OPTIONS, logits
from tiny_models import make_tiny_model

from nanovllm import LLM, ConfigError
from nanovllm.cli.main import main
from nanovllm.cli.parity import kl_divergence
from nanovllm.config import EngineConfig

pytestmark = pytest.mark.skipif(not native_library().eight_bit, reason="this processor has no products of 8 bits")
SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
INTEGERS = [name for name in SCHEMES if "fp8" not in name]


def cost(path, **options) -> float:
    """Nats a token that inputs of 8 bits take, beside the same weights."""
    plain, found = logits(path, **options), logits(path, quantize_activations=True, **options)
    assert not torch.equal(found, plain)
    return kl_divergence(plain.double(), found.double()).mean().item()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "granite-hybrid"])
def test_what_it_costs_where_weights_are_quantised_while_loading(tiny_model, family, scheme):
    assert cost(tiny_model(family), quantization=scheme) < 5e-3


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
def test_what_it_costs_with_a_files_own_blocks(tmp_path, kind):
    path = convert(make_tiny_model("llama", tmp_path, **SIZES), tmp_path / "m.gguf", kind, kinds={"attn_v": Kind.Q5_0})
    assert cost(path) < 5e-3


@pytest.mark.parametrize("scheme", INTEGERS)
def test_what_it_costs_of_published_checkpoints(tmp_path, scheme):
    quantised, _ = publish(make_tiny_model("llama", tmp_path, **SIZES), tmp_path, SCHEMES[scheme])
    assert cost(quantised) < 5e-3


@pytest.mark.parametrize(
    ("family", "scheme"),
    [("llama", "int8"), ("mixtral", "int4"), ("granite-hybrid-moe", "int4"), ("gpt2", "int8")],
)
def test_bits_are_the_requests_own(tiny_model, capsys, family, scheme):
    """Alone and in company, in chunks, after a prefix hit, preempted."""
    options = ("--dtype", "bfloat16", "--quantization", scheme, "--quantize-activations", "--batch-invariant")
    status = main(["verify", str(tiny_model(family)), "--max-tokens", "20", *options])
    out = capsys.readouterr().out
    assert status == 0, out
    assert " preempted)" in out


def test_steps_are_recorded(tiny_model):
    with LLM(str(tiny_model("mixtral")), **OPTIONS, quantization="int4", quantize_activations=True) as llm:
        recorded = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
        assert llm.engine._executor._runner._graphs is not None
    with LLM(
        str(tiny_model("mixtral")), **OPTIONS, quantization="int4", quantize_activations=True, enforce_eager=True
    ) as llm:
        eager = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    assert recorded == eager


def refused(path, message: str, **options) -> None:
    with pytest.raises(ConfigError, match=f"quantize_activations=True .*{re.escape(message)}.*; leave it out"):
        LLM(str(path), **OPTIONS, quantize_activations=True, **options)


def test_codes_that_are_no_integers_are_refused(tmp_path):
    llama = make_tiny_model("llama", tmp_path, **SIZES)
    refused(publish(llama, tmp_path / "ct", SCHEMES["ct-fp8-channel"])[0], "this checkpoint's are float8")
    refused(publish(llama, tmp_path / "fp8", SCHEMES["fp8-block"])[0], "those of 'fp8' are not")
    refused(llama, "takes weights that are quantised")


@pytest.mark.parametrize("name", ["avx512", "generic"])
def test_levels_without_such_products_are_told(tiny_model, name):
    with at_level(name) as supported:
        if supported:
            message = f"takes AVX512-BF16, VNNI and VBMI, and '{name}' is the most"
            refused(tiny_model("llama"), message, quantization="int8")


def test_torchs_kernels_do_not_have_it(tiny_model):
    with pytest.raises(ConfigError, match="kernels='torch' multiplies in 16 bits; set kernels='native'"):
        LLM(
            str(tiny_model("llama")),
            **OPTIONS,
            quantization="int8",
            quantize_activations=True,
            kernels="torch",
        )


def test_it_may_be_had_with_batch_invariance_on_cpus_alone():
    config = EngineConfig("m", quantization="int8", quantize_activations=True, batch_invariant=True, device="cpu")
    assert config.resolve(checkpoint_dtype="bfloat16", max_positions=64, cuda=False).quantize_activations
