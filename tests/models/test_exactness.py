"""On the native CPU path a request's bits are its own: every logit of every token, to the last bit, alone and
in company, in chunks, after a prefix hit, preempted, and on other pages, as `nanovllm verify` serves them."""

import pytest
from tiny_models import TINY

from nanovllm.cli.main import main
from nanovllm.ops.library import Library, library_or_reason

LIBRARY = library_or_reason()
pytestmark = pytest.mark.skipif(not isinstance(LIBRARY, Library), reason=str(LIBRARY))
NATIVE = ("--kernels", "native", "--attention-backend", "native")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", TINY)
def test_bits_are_the_requests_own(tiny_model, capsys, family, dtype):
    status = main(["verify", str(tiny_model(family)), "--dtype", dtype, "--max-tokens", "20", *NATIVE])
    out = capsys.readouterr().out
    assert status == 0, out
    assert " preempted)" in out
