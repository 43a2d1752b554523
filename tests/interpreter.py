"""Triton's interpreter, where it does what no GPU does."""

from __future__ import annotations

import numpy as np
import pytest
import torch


def multiply_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter multiply bfloat16 too, of which it takes the bits for whole numbers, and round to it: to the
    nearest, as GPUs do, where it cuts bits off."""
    from triton import language
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def create_fp_trunc(self, src, dst_type):
        if src.dtype.scalar != language.float32 or dst_type.scalar != language.bfloat16:
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(np.array(src.data)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), language.bfloat16)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(_numbers(a, d), _numbers(b, d), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", create_fp_trunc)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def patch_once_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter put its functions in the place of the language's once for each module that a kernel calls:
    it would do so at every call of a function within a kernel, which takes a fifth of the time."""
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_lang(fn):
        if fn.__module__ in patched:
            return interpreter._LangPatchScope()
        scope, outermost = patch(fn), not patched
        patched.add(fn.__module__)
        if outermost:
            restore = scope.restore

            def restore_all():
                patched.clear()
                restore()

            scope.restore = restore_all
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", patch_lang)


def dots_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter add products along K one after the other, as hardware does for every element of a tile:
    numpy's products give a row other bits in another place."""
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        products = _numbers(a, d)[:, :, None] * _numbers(b, d)[None]
        return interpreter.TensorHandle(d.data + products.sum(1), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def _numbers(factor, result) -> np.ndarray:
    """Of a factor, in the result's dtype."""
    from triton import language
    from triton.runtime import interpreter

    kind = factor.dtype.scalar
    if kind == language.bfloat16:
        return (factor.data.astype(np.uint32) << 16).view(np.float32)
    if kind.is_floating() and kind.primitive_bitwidth == 8:
        return interpreter._convert_float(factor.data, kind, language.float16, None).view(np.float16)
    return factor.data.astype(result.data.dtype)
