"""`batch_invariant` with the GPU's kernels: the bits of every logit, however requests are served. Without a GPU the
kernels are interpreted on the CPU, and requests are served in fewer ways."""

from __future__ import annotations

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.cli import verify
from nanovllm.cli.main import main
from nanovllm.cli.replay import Arrival, Way
from nanovllm.engine.cache_manager import CacheManager
from nanovllm.errors import ConfigError

pytest.importorskip("triton")
from interpreter import dots_in_order

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
FAMILIES = ["llama", "gpt2", "mixtral", "granite-hybrid"]
INTERPRETED = ("--device", "cpu", "--kernels", "triton", "--attention-backend", "triton")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled")


def few_ways(prompts, max_tokens, vocab_size, block_size):
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    plain, uncached = [Arrival(p, params) for p in prompts], {"enable_prefix_caching": False}
    batch = {"max_num_seqs": 3}
    return Way("alone", plain, {"max_num_seqs": 1, **uncached}), [
        Way("in chunks, in the opposite order", plain[::-1], {"max_num_batched_tokens": 20, **batch, **uncached}),
        Way("with too few pages", plain, {"num_kvcache_blocks": 6, **batch}),
    ]


def verified(model, capsys, *options: str) -> str:
    status = main(["verify", str(model), "--batch-invariant", *options])
    out = capsys.readouterr().out
    assert status == 0, out
    assert " preempted" in out
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen2-window", "falcon-rw-1b", "gemma3"])
def test_bits_are_the_requests_own(tiny_model, capsys, family, dtype):
    out = verified(tiny_model(family), capsys, "--device", "cuda", "--dtype", dtype, "--max-tokens", "20")
    assert "all 17 ways" in out


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_bits_are_the_requests_own_with_quantised_weights(tiny_model, capsys, family, scheme):
    out = verified(tiny_model(family), capsys, "--device", "cuda", "--quantization", scheme, "--max-tokens", "20")
    assert "all 17 ways" in out


@interpreted
@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [
        ("llama", "float32", ()),
        *(pytest.param(family, "float32", (), marks=pytest.mark.slow) for family in FAMILIES[1:]),
        *(pytest.param(family, "float16", (), marks=pytest.mark.slow) for family in FAMILIES),
        pytest.param("mixtral", "float16", ("--quantization", "int4"), marks=pytest.mark.slow),
    ],
)
def test_bits_are_the_requests_own_interpreted(tiny_model, capsys, monkeypatch, family, dtype, options):
    dots_in_order(monkeypatch)
    admit = CacheManager.admit  # sparing no pages for those who run, so that they are preempted soon
    monkeypatch.setattr(CacheManager, "admit", lambda self, seq, limit, spare=0: admit(self, seq, limit))
    monkeypatch.setattr(verify, "ways", few_ways)
    monkeypatch.setattr(verify, "_LENGTHS", (15, 31))
    out = verified(tiny_model(family), capsys, *INTERPRETED, "--dtype", dtype, "--max-tokens", "3", *options)
    assert "all 2 ways" in out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kernels": "torch"}, "kernels='torch' sums a row in an order that follows the others; set kernels='native'"),
        ({"attention_backend": "cpu"}, "attention_backend='cpu' computes .* set attention_backend='native'"),
        ({"model_impl": "transformers"}, "runs through transformers' modules, which do not promise it; leave it out"),
    ],
)
def test_what_does_not_hold_is_refused(tiny_model, options, reason):
    with pytest.raises(ConfigError, match=f"batch_invariant=True: .*{reason}"):
        LLM(str(tiny_model("llama")), skip_tokenizer_init=True, device="cpu", batch_invariant=True, **options)
