"""The shared library of csrc/, loaded by ctypes when a model is first built on a CPU."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

from nanovllm.errors import ConfigError

_PATH = Path(__file__).parents[1] / "csrc" / "libnanovllm.so"
_ABI = 13  # of csrc/library.cpp
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_GROUP = [_POINTER, _LONG, _LONG, ctypes.c_double]  # region, rank, size, timeout in seconds
_ROWS = [_POINTER, _LONG, _LONG, _LONG, _LONG, _LONG]  # x, outer, inner, their strides, size
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "nv_abi": (_INT, []),
    "nv_level": (ctypes.c_char_p, []),
    "nv_eight_bit": (_INT, []),
    "nv_set_level": (_INT, [ctypes.c_char_p]),
    "nv_pack": (None, [_POINTER, _POINTER, _LONG, _LONG, _INT, _LONG, _LONG, _INT]),
    "nv_pack_quantized": (
        None,
        [
            *(_INT, _POINTER, _POINTER, _POINTER),  # format, codes, scales, least values
            *(_POINTER, _POINTER, _LONG, _LONG),  # what these two are multiples of, rows, columns
            *(_LONG, _INT, _POINTER, _INT),  # first row or half, packed, threads
        ],
    ),
    "nv_quantize": (
        None,
        [
            *(_INT, _POINTER, _INT, _LONG, _LONG),  # format, weight, bfloat16?, rows, columns
            *(_POINTER, _POINTER, _POINTER, _INT),  # codes, scales, numbers in half precision, threads
        ],
    ),
    "nv_linear": (
        None,
        [
            *(_POINTER, _LONG, _INT, _POINTER, _INT, _POINTER),  # x, its stride, bfloat16?, weight, its format, columns
            *(_POINTER, _POINTER, _LONG, _POINTER, _LONG, _INT),  # bias, residual, its stride, y, its stride, bfloat16?
            *(_LONG, _LONG, _LONG),  # m, n, k
            *(_INT, _INT, _INT, _INT),  # activation, gated?, rows rounded to 8 bits?, threads
        ],
    ),
    "nv_route": (None, [_POINTER, _LONG, _LONG, _LONG, _INT, _POINTER, _POINTER, _INT]),
    "nv_mixture": (
        None,
        [
            *(_POINTER, _LONG, _POINTER, _POINTER, _LONG),  # x, its stride, weights, experts chosen, the first one here
            *(_LONG, _LONG, _LONG, _LONG, _LONG),  # tokens, experts, choices a token, hidden and inner size
            *(_POINTER, _POINTER, _LONG, _LONG),  # two weights, bytes of an expert
            *(_INT, _INT, _POINTER, _POINTER),  # the weights' formats, their columns
            *(_INT, _INT),  # activation, rows rounded to 8 bits?
            *(_POINTER, _POINTER, _POINTER, _POINTER, _INT),  # out, three to work in, threads
        ],
    ),
    "nv_rms_norm": (None, [*_ROWS, _POINTER, _FLOAT, _POINTER, _INT]),
    "nv_layer_norm": (None, [*_ROWS, _POINTER, _POINTER, _FLOAT, _POINTER, _INT]),
    "nv_attention": (
        None,
        [
            *(_POINTER, _LONG, _POINTER, _POINTER, _POINTER, _INT),  # q, its stride, out, keys, values, their format
            *(_LONG, _LONG, _LONG, _LONG),  # page size, heads, key/value heads, head size
            *(_LONG, _POINTER, _POINTER, _POINTER, _LONG),  # batch, query_start, seq_lens, tables, their stride
            *(_FLOAT, _LONG, _POINTER, _INT, _FLOAT, _INT),  # scale, window, slopes, rounded?, factor, threads
        ],
    ),
    "nv_store_kv": (
        None,
        [_POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _INT, _LONG, _LONG, _LONG, _INT],
    ),
    "nv_gather": (None, [_POINTER, _INT, _INT, _LONG, _LONG, _POINTER, _LONG, _LONG, _POINTER, _INT]),
    "nv_elementwise": (None, [_INT, _POINTER, _POINTER, _FLOAT, _FLOAT, _POINTER, _LONG, _LONG, _INT]),
    "nv_log_softmax": (None, [_POINTER, _LONG, _LONG, _LONG, _POINTER, _INT]),
    "nv_draw": (None, [_POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER, _INT]),
    "nv_penalise": (None, [_POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG, _INT]),
    "nv_mamba2": (
        None,
        [
            *(_POINTER, _LONG, _POINTER),  # projected, its stride, out
            *(_LONG, _LONG, _LONG, _LONG, _LONG),  # heads, head size, groups, state size, convolution's kernel
            *(_FLOAT, _FLOAT, _FLOAT),  # shortest and longest dt, eps
            *([_POINTER] * 7),  # filters, convolution's bias, A, D, dt_bias, norm, squares
            *(_POINTER, _POINTER),  # states of the convolution and of the recurrence
            *(_LONG, _LONG, _POINTER, _POINTER, _POINTER, _INT),  # tokens, batch, query_start, seq_lens, slots, threads
        ],
    ),
    "nv_rms_scale": (None, [_POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _FLOAT, _POINTER, _INT]),
    "nv_region_bytes": (_LONG, [_LONG, _LONG]),
    "nv_region_init": (None, [_POINTER, _LONG]),
    "nv_region_break": (None, [_POINTER]),
    "nv_all_reduce": (_INT, [*_GROUP, _POINTER, _LONG, _LONG, _POINTER, _INT]),
    "nv_gather_ranks": (_INT, [*_GROUP, _LONG, _POINTER, _LONG, _LONG, _LONG, _POINTER, _INT]),
    "nv_record": (None, []),
    "nv_recorded": (_POINTER, []),
    "nv_fit": (_INT, [_POINTER, _LONG, _LONG, _LONG]),
    "nv_resize": (None, [_POINTER, _LONG, _LONG, _LONG]),
    "nv_replay": (_INT, [_POINTER, _INT]),
    "nv_free": (None, [_POINTER]),
    "nv_rope": (None, [*_ROWS, _POINTER, _POINTER, _LONG, _POINTER, _INT]),
}
LEVELS = ("generic", "avx2", "avx512", "avx512bf16")


class NativeUnavailable(Exception):
    """Why there is no library; for the log."""


class Library:
    """The C functions, typed once: a call costs about a microsecond."""

    def __init__(self, path: Path) -> None:
        try:
            library = ctypes.CDLL(str(path))
            found = library.nv_abi()
        except (OSError, AttributeError) as error:
            raise NativeUnavailable(f"the native kernels in {path} do not load ({error})") from error
        if found != _ABI:
            raise NativeUnavailable(f"the native kernels in {path} are of another version; install again")
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.pack, self.pack_quantized = library.nv_pack, library.nv_pack_quantized
        self.quantize = library.nv_quantize
        self.linear = library.nv_linear
        self.route = library.nv_route
        self.mixture = library.nv_mixture
        self.rms_norm = library.nv_rms_norm
        self.layer_norm = library.nv_layer_norm
        self.rope = library.nv_rope
        self.attention = library.nv_attention
        self.store_kv = library.nv_store_kv
        self.gather = library.nv_gather
        self.elementwise = library.nv_elementwise
        self.log_softmax, self.draw, self.penalise = library.nv_log_softmax, library.nv_draw, library.nv_penalise
        self.mamba2, self.rms_scale = library.nv_mamba2, library.nv_rms_scale
        self.region_bytes, self.region_init = library.nv_region_bytes, library.nv_region_init
        self.region_break = library.nv_region_break
        self.all_reduce, self.gather_ranks = library.nv_all_reduce, library.nv_gather_ranks
        self.record, self.recorded = library.nv_record, library.nv_recorded
        self.fit, self.resize = library.nv_fit, library.nv_resize
        self.replay, self.free = library.nv_replay, library.nv_free
        self._level, self._set_level, self._eight_bit = library.nv_level, library.nv_set_level, library.nv_eight_bit

    @property
    def level(self) -> str:
        """The instruction set that is used."""
        return self._level().decode()

    @property
    def eight_bit(self) -> bool:
        """Whether linear layers can round their rows to 8 bits at this level."""
        return bool(self._eight_bit())

    def set_level(self, level: str) -> bool:
        """For the whole process; False if this processor or build has no such level."""
        return self._set_level(level.encode()) == 0


def load_library() -> Library:
    """NANOVLLM_ISA names the level; the processor's best without it. NativeUnavailable, or ConfigError
    for a level that is not to be had."""
    if not _PATH.exists():
        raise NativeUnavailable("the native kernels were not built (a C++ compiler was missing at installation)")
    library = Library(_PATH)
    level = os.environ.get("NANOVLLM_ISA")
    if level is not None and not library.set_level(level):
        raise ConfigError(f"NANOVLLM_ISA={level!r}: not one of {', '.join(LEVELS)} that runs here")
    return library


@functools.cache
def library_or_reason() -> Library | str:
    """The library, loaded once, or why there is none."""
    try:
        return load_library()
    except NativeUnavailable as error:
        return str(error)
