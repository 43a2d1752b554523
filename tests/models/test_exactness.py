"""On the native CPU path a request's bits are its own: every logit of every token, to the last bit, alone and
in company, in chunks, after a prefix hit, preempted, and on other pages, as `nanovllm verify` serves them."""

from pathlib import Path

import pytest
from kernels import native_library
from native_calls import native_row
from tiny_models import TINY

from nanovllm.cli.main import main

native_library()
PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
NATIVE = ("--kernels", "native", "--attention-backend", "native")


# in float32 by default where layers are not those of another
USUAL = ("llama", "gpt2", "mixtral", "granite-hybrid", "gemma3", "mpt", "falcon-40b")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, "bfloat16") for family in TINY),
        *(pytest.param(f, "float32", marks=[] if f in USUAL else pytest.mark.slow) for f in TINY),
    ],
)
def test_bits_are_the_requests_own(tiny_model, capsys, family, dtype):
    status = main(["verify", str(tiny_model(family)), "--dtype", dtype, "--max-tokens", "20", *NATIVE])
    out = capsys.readouterr().out
    assert status == 0, out
    assert " preempted)" in out


@pytest.mark.parametrize("family", TINY)
def test_every_step_is_recorded(tiny_model, family):
    """None falls back to computing op by op without anybody noticing, and docs/models.md says what each calls."""
    row = f"| {family} | {' | '.join(native_row(tiny_model(family)))} |"
    assert row in PAGE, row
