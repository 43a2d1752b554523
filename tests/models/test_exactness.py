"""On the native CPU path a request's bits are its own: every logit of every token, to the last bit, alone and
in company, in chunks, after a prefix hit, preempted, and on other pages, as `nanovllm verify` serves them."""

import pytest
from kernels import native_library
from tiny_models import TINY

from nanovllm import LLM, SamplingParams
from nanovllm.cli.main import main

native_library()
NATIVE = ("--kernels", "native", "--attention-backend", "native")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", TINY)
def test_bits_are_the_requests_own(tiny_model, capsys, family, dtype):
    status = main(["verify", str(tiny_model(family)), "--dtype", dtype, "--max-tokens", "20", *NATIVE])
    out = capsys.readouterr().out
    assert status == 0, out
    assert " preempted)" in out


@pytest.mark.parametrize("family", TINY)
def test_every_step_is_recorded(tiny_model, family):
    """None falls back to computing op by op without anybody noticing."""
    with LLM(str(tiny_model(family)), skip_tokenizer_init=True, max_num_batched_tokens=16, max_num_seqs=4) as llm:
        llm.generate([[5, 6, 7], list(range(2, 40))], SamplingParams(max_tokens=4, temperature=0), use_tqdm=False)
        assert llm.engine._executor._runner._graphs is not None
