"""Which LinearMethod a layer gets."""

from __future__ import annotations

from nanovllm.build_context import BuildContext
from nanovllm.config import STORED
from nanovllm.ops.formats import Q4, Q8_FINE
from nanovllm.quantization.linear_method import LinearMethod, UnquantizedLinearMethod
from nanovllm.quantization.quantized_method import DequantizedLinearMethod, QuantizedLinearMethod
from nanovllm.quantization.stored import StoredLinearMethod

_FORMS = {"int8": Q8_FINE, "int4": Q4}


def linear_method(ctx: BuildContext) -> LinearMethod:
    """Of a projection."""
    return _method(ctx, ctx.quantization)


def head_method(ctx: BuildContext) -> LinearMethod:
    """Of the head, which decides between tokens: not below 8 bits, but as a GGUF file has it."""
    return _method(ctx, "int8" if ctx.quantization == "int4" else ctx.quantization)


def _method(ctx: BuildContext, name: str | None) -> LinearMethod:
    ops = ctx.ops
    if name in STORED and ops.packs_quantized:
        return StoredLinearMethod(ops)
    if name not in _FORMS:
        return UnquantizedLinearMethod(ops)
    if ops.packs_quantized:
        return QuantizedLinearMethod(ops, _FORMS[name])
    return DequantizedLinearMethod(ops, _FORMS[name])
