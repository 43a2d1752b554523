"""Triton's interpreter, where it does what no chip does."""

from __future__ import annotations

import numpy as np
import pytest


def multiply_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter multiply bfloat16 too: it takes the bits for whole numbers."""
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return interpreter.TensorHandle(np.matmul(_numbers(a), _numbers(b)) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def _numbers(handle) -> np.ndarray:
    """In fp32, of 16 or 32 bits."""
    from triton import language

    if handle.dtype.scalar == language.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)
