"""Teach Triton's interpreter bf16: it holds the bits as integers, and multiplies those.

With it, kernels in bf16 have the errors that they have on a GPU (o 3e-3, db 5e-3), so that what
rounding does to them can be looked into without one. Import this instead of triton, in a process
of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Builder: Any = interpreter.InterpreterBuilder
_Handle: Any = interpreter.TensorHandle


def _is_bf16(x: Any) -> bool:
    return bool(x.dtype.scalar == tl.bfloat16)


def _to_fp32(x: Any) -> Any:
    return (x.data.astype(np.uint32) << 16).view(np.float32)


def _to_bits(values: Any) -> Any:
    """fp32 to the bits of bf16, to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def _elementwise(operation: Callable[..., Any], otherwise: Callable[..., Any]) -> Any:
    def patched(builder: Any, *operands: Any) -> Any:
        if not _is_bf16(operands[0]):
            return otherwise(builder, *operands)
        return _Handle(_to_bits(operation(*map(_to_fp32, operands))), tl.bfloat16)

    return patched


def _dot(otherwise: Callable[..., Any]) -> Any:
    def patched(builder: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        if not _is_bf16(a):
            return otherwise(builder, a, b, accumulator, *options)
        product = np.matmul(_to_fp32(a), _to_fp32(b), dtype=np.float32)
        return _Handle(product + accumulator.data, accumulator.dtype.scalar)

    return patched


def _truncate(otherwise: Callable[..., Any]) -> Any:
    def patched(builder: Any, x: Any, to: Any) -> Any:
        if to.scalar == tl.bfloat16 and x.dtype.scalar == tl.float32:
            return _Handle(_to_bits(x.data), tl.bfloat16)
        return otherwise(builder, x, to)

    return patched


_Builder.create_dot = _dot(_Builder.create_dot)
_Builder.create_fp_trunc = _truncate(_Builder.create_fp_trunc)
for _name, _operation in (
    ("create_fadd", np.add),
    ("create_fsub", np.subtract),
    ("create_fmul", np.multiply),
    ("create_fneg", np.negative),
):
    # Triton 3.6 negates by subtracting
    if hasattr(_Builder, _name):
        setattr(_Builder, _name, _elementwise(_operation, getattr(_Builder, _name)))
