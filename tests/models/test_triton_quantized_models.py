"""Whole models with quantised weights on the GPU's kernels: the logits of the same weights widened. Without a GPU the
kernels are interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch
from gguf_converter import FAMILIES, Kind, convert
from published import SCHEMES, publish
from tiny_models import make_tiny_model

from nanovllm import LLM
from nanovllm.cli.parity import all_logits

pytest.importorskip("triton")
HERE = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are compiled")
DEVICES = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", "float16", marks=HERE),
        *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in ("bfloat16", "float16")),
    ],
)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
TOKENS = [5, 9, 80, 23, 7, 11, 64, 100, 2]


def logits(path, **options) -> torch.Tensor:
    fixed = {"skip_tokenizer_init": True, "num_kvcache_blocks": 20, "enforce_eager": True, "max_model_len": 64}
    with LLM(str(path), attention_backend="reference", enable_prefix_caching=False, **fixed, **options) as llm:
        return all_logits(llm, TOKENS)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1, "num_attention_heads": 4}
PUBLISHED = [
    ("llama", "awq-64"),
    *(
        slow("llama", scheme)
        for scheme in ("gptq-4-act-order", "gptq-8-v2-head", "w8a8", "ct-fp8-channel", "fp8-block")
    ),
]


def check(found: torch.Tensor, wanted: torch.Tensor, dtype: str) -> None:
    """Products of the same numbers, in another order: rounding is what they differ by, of some layers."""
    unit = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    torch.testing.assert_close(found, wanted, rtol=0, atol=8 * unit * wanted.abs().max().item())


@DEVICES
@pytest.mark.parametrize(
    ("family", "scheme"),
    [slow("gpt2", "int4"), slow("llama3", "int4"), slow("qwen3-moe", "int8"), slow("llama", "int8")],
)
def test_schemes(tiny_model, family, scheme, device, dtype):
    """With tied heads, of which tokens are looked up."""
    options = {"quantization": scheme, "device": device, "dtype": dtype}
    found = logits(tiny_model(family), kernels="triton", **options)
    options |= {"dtype": "bfloat16"} if device == "cpu" else {}
    wanted = logits(tiny_model(family), kernels="torch", **options)
    check(found, wanted, "bfloat16")


@DEVICES
@pytest.mark.parametrize("family", ["qwen3-moe", slow("llama"), slow("gpt2"), slow("granite-hybrid-moe")])
def test_a_files_own_blocks(tmp_path, family, device, dtype):
    """Of several types in one layer, and floats; the default, without being told."""
    kinds = {"ffn_down": Kind.Q8_0, "attn_v": Kind.Q4_0, "attn_k": Kind.F16, "token_embd": Kind.Q8_0}
    path = convert(make_tiny_model(family, tmp_path, **FAMILIES[family]), tmp_path / "m.gguf", Kind.Q4_1, kinds=kinds)
    options = {"device": device, "dtype": dtype}
    found = logits(path, kernels="triton", **options)
    check(found, logits(path, kernels="triton", quantization="dequantize", **options), dtype)


@DEVICES
@pytest.mark.parametrize(("family", "scheme"), PUBLISHED)
def test_published_codes(tmp_path, family, scheme, device, dtype):
    made = tmp_path / "made"
    made.mkdir()
    quantised, plain = publish(make_tiny_model(family, made, **WIDE), tmp_path, SCHEMES[scheme])
    options = {"device": device, "dtype": dtype}
    found = logits(quantised, kernels="triton", **options)
    check(found, logits(plain, kernels="triton", **options), dtype)
