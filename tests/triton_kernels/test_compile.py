"""Every variant of every Triton kernel compiles for its chips, ahead of time, and fits: no GPU is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")
from triton_kernels.compiled import SHARED, check

import nanovllm.triton_kernels

FOLDER = Path(nanovllm.triton_kernels.__path__[0])
MODULES = {path.stem for path in FOLDER.glob("*.py") if "def variants()" in path.read_text()}
ELSEWHERE = {"prompt_attention", "decode_attention"}  # test_compile_attention.py
NOT_FOR_TURING = {"eight_bit_activations", "eight_bit_linear", "linear"}


@pytest.mark.parametrize(
    ("module", "chip"),
    [(m, chip) for m in sorted(MODULES - ELSEWHERE) for chip in SHARED if chip != 75 or m not in NOT_FOR_TURING],
)
def test_every_variant_compiles(worker, module, chip):
    check(worker(module, chip))
