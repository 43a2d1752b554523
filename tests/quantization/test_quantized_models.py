"""Models with quantised weights: their bits, and what files, plans and ranks make of them."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed.families import GREEDY, PROMPTS, SCARCE
from gguf_converter import FAMILIES, Kind, convert
from kernels import native_library
from tiny_models import TINY, make_tiny_model

from nanovllm import LLM, ConfigError
from nanovllm.cli.main import main
from nanovllm.cli.parity import all_logits, kl_divergence
from nanovllm.config import EngineConfig
from nanovllm.engine.build import find_model
from nanovllm.engine.runner.memory_plan import footprint
from nanovllm.errors import WeightError
from nanovllm.ops.formats import Q8_FINE
from nanovllm.ops.native import NativeOps
from nanovllm.quantization.ggml import KINDS as BLOCKS
from nanovllm.quantization.ggml import GGMLBlocks
from nanovllm.quantization.linear_method import LinearWeights
from nanovllm.quantization.stored import StoredLinearMethod
from nanovllm.weights.checkpoint import open_checkpoint

native_library()
TOKENS = np.random.default_rng(1).integers(2, 128, 40).tolist()
OPTIONS = {"skip_tokenizer_init": True, "kvcache_memory": "8MiB", "device": "cpu"}
SCHEMES = ["int8", "int4"]
FILES = ("llama", "qwen3-moe", "gpt2", "falcon-40b", "granite-hybrid-moe")  # each way to rearrange rows
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}


def slow_unless(is_quick: bool, *values):
    return pytest.param(*values, marks=[] if is_quick else pytest.mark.slow)


def cases(families: dict[str, str]):
    """(family, scheme); quick is the scheme that a family is given with."""
    return [slow_unless(scheme == quick, family, scheme) for family, quick in families.items() for scheme in SCHEMES]


def logits(path: Path, **options) -> torch.Tensor:
    with LLM(str(path), **OPTIONS, enforce_eager=True, enable_prefix_caching=False, **options) as llm:
        return all_logits(llm, TOKENS)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """Rows of 256, as K-quants need them."""
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("wide"), **WIDE)


# --- GGUF ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [slow_unless(f in FILES, f) for f in FAMILIES])
def test_blocks_give_the_bits_of_the_dequantised_model(tmp_path, family):
    """Rows are rearranged, split, joined and, twice, transposed on their way."""
    model = make_tiny_model(family, tmp_path, **FAMILIES[family])
    path = convert(model, tmp_path / "m.gguf", Kind.Q4_1, kinds={"ffn_down": Kind.Q8_0, "attn_v": Kind.Q4_0})
    found = logits(path)
    assert torch.equal(found, logits(path, quantization="dequantize"))
    assert torch.equal(found, logits(path, quantization="gguf", dtype="bfloat16"))


KINDS = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_that_has_kernels(wide_model, tmp_path, level, kind):
    path = convert(wide_model, tmp_path / "m.gguf", kind)
    assert torch.equal(logits(path), logits(path, quantization="dequantize"))


def test_types_may_be_mixed_in_one_layer(wide_model, tmp_path):
    kinds = {"attn_v": Kind.Q6_K, "attn_k": Kind.F16, "ffn_up": Kind.Q5_K, "token_embd": Kind.Q8_0}
    path = convert(wide_model, tmp_path / "m.gguf", Kind.Q4_K, kinds=kinds)
    assert torch.equal(logits(path), logits(path, quantization="dequantize"))


def test_types_without_kernels_are_widened_with_a_notice(wide_model, tmp_path, caplog):
    path = convert(wide_model, tmp_path / "m.gguf", Kind.Q4_0, kinds={"ffn": Kind.TQ2_0})
    with caplog.at_level(logging.WARNING):
        found = logits(path)
    assert [r.message for r in caplog.records] == ["no kernels for TQ2_0: such weights are widened while loading"]
    assert torch.equal(found, logits(path, quantization="dequantize"))


def test_experts_of_a_layer_have_one_type():
    """Their weights are one tensor; files that store experts one by one could differ."""
    method, layers = StoredLinearMethod(NativeOps(native_library())), [LinearWeights(), LinearWeights()]
    for layer in layers:
        method.create(layer, 8, 32, torch.bfloat16, torch.device("cpu"))
    method.stack(layers)
    for layer, kind in zip(layers, ("Q4_0", "Q8_0"), strict=True):
        blocks = GGMLBlocks(kind, torch.zeros(8, BLOCKS[kind].bytes, dtype=torch.uint8), 32)
        method.load(layer, blocks, slice(0, 8))
    method.finalize(layers[0])
    with pytest.raises(WeightError, match="quantised in different ways: set quantization='dequantize'"):
        method.finalize(layers[1])


def test_a_file_in_float32_and_on_torchs_kernels_is_dequantised(wide_model, tmp_path):
    path = convert(wide_model, tmp_path / "m.gguf", Kind.Q4_0)
    assert torch.equal(logits(path, dtype="float32"), logits(path, dtype="float32", quantization="dequantize"))
    torch_kernels = {"kernels": "torch", "attention_backend": "cpu"}
    expected = logits(path, quantization="dequantize", **torch_kernels)
    assert torch.equal(logits(path, **torch_kernels), expected)


# --- schemes of our own ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "scheme"),
    cases({"llama": "int8", "mixtral": "int4", "granite-hybrid-moe": "int8", "gpt2": "int4", "gemma3": ""}),
)
def test_bits_are_the_requests_own(tiny_model, capsys, family, scheme):
    """Alone and in company, in chunks, after a prefix hit, preempted; tied heads and such of their own."""
    options = ("--dtype", "bfloat16", "--kernels", "native", "--attention-backend", "native")
    status = main(["verify", str(tiny_model(family)), "--quantization", scheme, "--max-tokens", "20", *options])
    out = capsys.readouterr().out
    assert status == 0, out
    assert " preempted)" in out


@pytest.mark.parametrize(
    ("family", "scheme"), cases(dict.fromkeys(TINY, "") | {"llama3": "int8", "granitemoe": "int4", "mpt": "int4"})
)
def test_native_kernels_and_torch_compute_with_the_same_weights(tiny_model, family, scheme):
    path = tiny_model(family)
    native = logits(path, quantization=scheme)
    reference = logits(path, quantization=scheme, kernels="torch", attention_backend="reference")
    plain = logits(path, dtype="float32")
    # of most tokens: what torch's arithmetic in bfloat16 loses changes a router's choices for a few
    assert 0 < kl_divergence(reference, native).median() < 0.2 * kl_divergence(plain, native).median() + 2e-4


def test_what_a_scheme_costs(tiny_model):
    path = tiny_model("llama")
    plain = logits(path, dtype="float32")
    cost = {name: kl_divergence(plain, logits(path, quantization=name)).mean() for name in SCHEMES}
    assert cost["int8"] < 1e-3 and cost["int8"] < cost["int4"] < 0.1


@pytest.mark.parametrize("quantization", [*SCHEMES, None])
def test_steps_are_recorded(tiny_model, wide_model, tmp_path, quantization):
    path = tiny_model("mixtral") if quantization else convert(wide_model, tmp_path / "m.gguf", Kind.Q6_K)
    with LLM(str(path), **OPTIONS, quantization=quantization, kernels="native") as llm:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert llm.engine._executor._runner._graphs is not None


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["mixtral", "granite-hybrid-moe", "gpt2"])
def test_what_stays_as_it_is(tiny_model, family, scheme):
    """Norms, biases, positions, embeddings that are no head, routers, and what Mamba2 has beside its projections."""
    parameters = {}
    for quantization in (None, scheme):
        options = OPTIONS | {"dtype": "bfloat16", "enforce_eager": True, "quantization": quantization}
        with LLM(str(tiny_model(family)), **options, kernels="native") as llm:
            (model,) = llm.apply_model(lambda model: model)
            parameters[quantization] = {name: p.clone() for name, p in model.named_parameters()}
            head = model.lm_head.quantized
    changed = {name for name, p in parameters[None].items() if not torch.equal(p, parameters[scheme][name])}
    linear = re.compile(r"(proj|c_attn|c_fc|lm_head)\.weight$")
    assert changed == {name for name in parameters[None] if linear.search(name)}
    assert [segment.form for segment in head.segments] == [Q8_FINE]


# --- memory ------------------------------------------------------------------------------------------


def planned(path: Path, tp: int = 1, **options) -> int:
    checkpoint = open_checkpoint(path)
    asked = EngineConfig(str(path), **options)
    family, sizes = find_model(asked, checkpoint)
    positions = sizes.max_position_embeddings
    config = asked.resolve(
        checkpoint_dtype=checkpoint.dtype, max_positions=positions, cuda=False, quantized=checkpoint.quantization
    )
    return footprint(family, sizes, config, tp, checkpoint).weights


@pytest.mark.parametrize("quantization", [*SCHEMES, None])
@pytest.mark.parametrize("family", ["llama", "mixtral", "granite-hybrid-moe", "gpt2"])
def test_a_plan_is_what_is_allocated(tmp_path, family, quantization):
    path = make_tiny_model(family, tmp_path, **FAMILIES[family])
    if quantization is None:
        path = convert(path, tmp_path / "m.gguf", Kind.Q4_1, kinds={"ffn_down": Kind.Q8_0})
    with LLM(str(path), **OPTIONS, quantization=quantization) as llm:
        (weights,) = llm.apply_model(lambda m: {id(p): p.numel() * p.itemsize for p in m.parameters()})
    assert planned(path, quantization=quantization) == sum(weights.values())


def test_quantised_weights_are_small(wide_model):
    plain, int8, int4 = (planned(wide_model, quantization=q, dtype="bfloat16") for q in (None, *SCHEMES))
    head = embedding = 128 * 256 * 2
    linears = plain - head - embedding
    assert int8 - embedding < 0.57 * (plain - embedding)
    assert int4 - embedding - head // 2 < 0.34 * linears


# --- ranks -------------------------------------------------------------------------------------------


def generated(path: str, **options):
    with LLM(path, **SCARCE, dtype="bfloat16", **options) as llm:
        return [o.outputs[0] for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


@pytest.mark.parametrize("quantization", [*SCHEMES, None])
@pytest.mark.parametrize("family", [slow_unless(f == "llama", f) for f in ("llama", "mixtral", "granite-hybrid-moe")])
def test_two_ranks_have_the_weights_of_one(tmp_path, family, quantization):
    """Their sums have another order, but scales are of whole rows and groups: probabilities stay within rounding."""
    path = make_tiny_model(family, tmp_path, **FAMILIES[family] | {"intermediate_size": 128})
    if quantization is None:
        path = convert(path, tmp_path / "m.gguf", Kind.Q4_1)
    one, two = (generated(str(path), quantization=quantization, tensor_parallel_size=n) for n in (1, 2))
    for alone, shared in zip(one, two, strict=True):
        assert alone.token_ids == shared.token_ids
        pairs = zip(alone.token_ids, alone.logprobs, shared.logprobs, strict=True)
        assert max(abs(a[t].logprob - b[t].logprob) for t, a, b in pairs) < 0.02


def test_ranks_do_not_part_groups(tmp_path):
    path = make_tiny_model("llama", tmp_path, **FAMILIES["llama"] | {"intermediate_size": 192})
    refusal = (
        "columns of a projection in groups of 32: (64|192) does not divide by tensor_parallel_size=4; "
        "sizes that can: 1, 2"
    )
    with pytest.raises(ConfigError, match=refusal):
        planned(path, 4, quantization="int4")
    planned(path, 2, quantization="int4")
    with pytest.raises(ConfigError, match=refusal):
        planned(convert(path, tmp_path / "m.gguf", Kind.Q4_1), 4)


# --- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int8", "dtype": "float32"}, "runs with dtype='bfloat16', not 'float32'"),
        ({"quantization": "int4", "dtype": "float16"}, "runs with dtype='bfloat16', not 'float16'"),
        ({"quantization": "gguf"}, "is for checkpoints that are, which this is not"),
        ({"quantization": "dequantize"}, "is for checkpoints that are, which this is not"),
        ({"quantization": "nf4"}, "'nf4' is not one of int8, int4, gguf, awq, gptq, compressed-tensors, fp8"),
        ({"quantization": "fp8"}, "is for checkpoints that are, which this is not"),
        ({"quantization": "int8", "model_impl": "transformers"}, "transformers' modules: leave quantization out"),
    ],
)
def test_refusals(tiny_model, options, message):
    with pytest.raises(ConfigError, match=message):
        LLM(str(tiny_model("llama")), **OPTIONS, **options)


@pytest.mark.parametrize(("dtype", "quantization"), [("bfloat16", "gguf"), ("float16", "gguf"), ("float32", None)])
def test_gpus_compute_with_a_files_blocks_in_16_bits(dtype, quantization):
    known = {"checkpoint_dtype": "bfloat16", "max_positions": 64, "cuda": True, "quantized": "gguf"}
    assert EngineConfig("m", dtype=dtype).resolve(**known).quantization == quantization
    if quantization is None:
        with pytest.raises(ConfigError, match="runs with dtype='bfloat16' or 'float16', not 'float32'"):
            EngineConfig("m", dtype=dtype, quantization="int8").resolve(**known)


@pytest.mark.parametrize(
    ("options", "quantized", "reason"),
    [
        ({"device": "cuda"}, None, "takes weights that are quantised"),
        ({"device": "cuda"}, "gguf", "is for checkpoints by 'compressed-tensors' or 'fp8' on GPUs"),
        ({"device": "cuda", "quantization": "dequantize"}, "fp8", "computes with their codes"),
        ({"device": "cpu"}, None, "takes weights that are quantised"),
        ({"device": "cpu"}, "fp8", "takes codes that are integers on CPUs"),
        ({"device": "cuda", "batch_invariant": True}, "fp8", "batch_invariant=True rules out"),
    ],
)
def test_where_activations_cannot_be_quantised(options, quantized, reason):
    config = EngineConfig("m", quantize_activations=True, **options)
    with pytest.raises(ConfigError, match=f"quantize_activations=True .*{reason}.*; leave it out"):
        config.resolve(checkpoint_dtype="bfloat16", max_positions=64, cuda=True, quantized=quantized)


@pytest.mark.parametrize("cuda", [False, True])
def test_a_float32_checkpoint_is_computed_in_bfloat16_when_it_is_quantised(cuda):
    config = EngineConfig("m", quantization="int8").resolve(checkpoint_dtype="float32", max_positions=64, cuda=cuda)
    assert config.dtype == "bfloat16"


def test_plan_command(tiny_model, capsys):
    assert main(["plan", str(tiny_model("llama")), "--quantization", "int4", "--memory", "1GiB"]) == 0
    out = capsys.readouterr().out
    assert "bfloat16, int4 weights on cpu" in out
    assert f"({planned(tiny_model('llama'), quantization='int4'):,} bytes)" in out


# --- loading -------------------------------------------------------------------------------------------

PEAK = """
import re, sys
from nanovllm import LLM
LLM(sys.argv[1], quantization=sys.argv[2] or None, dtype="bfloat16", max_model_len=64, max_num_seqs=1,
    kvcache_memory="4MiB", skip_tokenizer_init=True)
print(re.search("VmHWM: *(.*) kB", open("/proc/self/status").read())[1])  # ru_maxrss is inherited
"""


@pytest.mark.slow
def test_no_more_than_a_tensor_is_unquantised_while_loading(tmp_path):
    """Each scheme's peak is below that of bfloat16 by about what it saves of the linear layers' 100 MiB."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, "num_attention_heads": 12}
    path = make_tiny_model("llama", tmp_path, **sizes)
    gguf = convert(path, tmp_path / "m.gguf", Kind.Q4_0)

    def peak(source: Path, scheme: str) -> float:
        command = [sys.executable, "-c", PEAK, str(source), scheme]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024  # MiB

    plain, dequantised = peak(path, ""), peak(gguf, "dequantize")
    assert plain - peak(path, "int8") > 35
    assert plain - peak(path, "int4") > 50
    assert dequantised - peak(gguf, "gguf") > 50
