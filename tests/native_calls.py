"""Which native kernels a model's recorded steps call, and in which form."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.ops.library import Library, library_or_reason
from nanovllm.ops.native import _ACTIVATIONS

COLUMNS = ("linear", "norm", "rotation", "attention", "other")
_ACTS = {number: name for name, number in reversed(_ACTIVATIONS.items())}
_MAPS = ("add", "scale", "divide", "clamp")
# where the C functions have them
_BIAS, _RESIDUAL, _ACT, _GATED = 6, 7, 15, 16
_ROW_SIZE, _HALF = 5, 8
_HEADS, _KV_HEADS, _WINDOW, _SLOPES = 7, 8, 16, 17


def native_row(path: Path) -> tuple[str, ...]:
    """A cell a column for the model in this directory; fails if a step was computed op by op."""
    library = library_or_reason()
    assert isinstance(library, Library), library
    seen: dict[str, dict[str, None]] = defaultdict(dict)

    def noting(name: str, call: Any) -> Any:
        column, describe = _NOTED[name]

        def noted(*args: Any) -> None:
            seen[column][describe(args)] = None
            call(*args)

        return noted

    options = {"kernels": "native", "max_num_batched_tokens": 16, "max_num_seqs": 4, "skip_tokenizer_init": True}
    with pytest.MonkeyPatch.context() as patch, LLM(str(path), **options) as llm:
        for name in _NOTED:
            patch.setattr(library, name, noting(name, getattr(library, name)))
        llm.generate([[5, 6, 7], list(range(2, 40))], SamplingParams(max_tokens=4, temperature=0), use_tqdm=False)
        assert llm.engine._executor._runner._graphs is not None
    return tuple(", ".join(sorted(seen[column])) or "-" for column in COLUMNS)


def _linear(args: tuple) -> str:
    act = _ACTS.get(args[_ACT], "")
    form = f"gated {act}" if args[_GATED] else act or "plain"
    return form + (" + bias" if args[_BIAS] else "") + (" + residual" if args[_RESIDUAL] else "")


def _attention(args: tuple) -> str:
    heads, kv_heads = args[_HEADS], args[_KV_HEADS]
    kind = "MHA" if heads == kv_heads else "MQA" if kv_heads == 1 else "GQA"
    return kind + (" in a window" if args[_WINDOW] else "") + (" with ALiBi" if args[_SLOPES] else "")


_NOTED = {
    "linear": ("linear", _linear),
    "rms_norm": ("norm", lambda args: "RMS"),
    "layer_norm": ("norm", lambda args: "layer"),
    "rope": ("rotation", lambda args: "whole heads" if 2 * args[_HALF] == args[_ROW_SIZE] else "part of heads"),
    "attention": ("attention", _attention),
    "mamba2": ("other", lambda args: "Mamba2"),
    "route": ("other", lambda args: "route"),
    "mixture": ("other", lambda args: f"mixture of {_ACTS[args[18]]} experts"),
    "elementwise": ("other", lambda args: _MAPS[args[0]]),
}
