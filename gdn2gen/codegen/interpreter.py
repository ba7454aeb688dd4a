"""Triton's interpreter mended, and taught bf16.

Of bf16 it holds the bits as integers, and computes with those: Triton 3.6 to 3.9 give products of
such tiles that are off by 1e11, and say nothing. Taught, kernels in bf16 have the errors that they
have on a GPU (o 3e-3, db 5e-3).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from threading import RLock
from typing import Any, Final

import torch
import triton
import triton.language as tl

from gdn2gen.base.errors import UnsupportedError

_SIZE: Final = 16
# The interpreter keeps the running program in globals: launches of two threads spoil each other.
_ONE_AT_A_TIME: Final = RLock()


def one_at_a_time(launch: Callable[..., None]) -> Callable[..., None]:
    """`launch`, which waits while another thread interprets a kernel."""

    @wraps(launch)
    def waiting(*operands: Any, **scalars: Any) -> None:
        with _ONE_AT_A_TIME:
            launch(*operands, **scalars)

    return waiting


def mend_loops() -> None:
    """Let loops in Triton 3.6's interpreter end at an argument under NumPy 2.4, as from 3.7 on.

    There the argument is an array of one element, which that NumPy takes for no integer.
    """
    import importlib.metadata

    if not importlib.metadata.version("triton").startswith("3.6."):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if patch.__name__ == "mended":
        return

    def mended(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = mended


def mend_masks() -> None:
    """Let one comparison be the mask of a whole tile: the interpreter keeps its result, which is of
    bools, under the type of what was compared, and spreads it as such."""
    import numpy as np
    from triton.runtime import interpreter

    Builder: Any = interpreter.InterpreterBuilder
    splat = Builder.create_splat
    if splat.__name__ == "mended":
        return

    def mended(builder: Any, to: Any, x: Any) -> Any:
        if x.data.dtype != np.bool_:
            return splat(builder, to, x)
        return interpreter.TensorHandle(np.full(to.shape, x.data[0]), tl.int1)

    Builder.create_splat = mended


def teach_waits() -> None:
    """Have waits for the launch before be nothing: here launches follow each other."""
    for name in ("gdc_wait", "gdc_launch_dependents"):
        setattr(tl.extra.cuda, name, lambda **_: None)


def teach_bf16() -> None:
    """Have the interpreter of this process compute in bf16 as GPUs do.

    That serves every kernel of the process, and is nothing where the interpreter is right already.
    Raises UnsupportedError for a Triton that this does not mend.
    """
    with _ONE_AT_A_TIME:
        taught = _is_taught()
    if not taught:
        raise UnsupportedError(
            f"Triton {triton.__version__}'s interpreter computes with the bits of bf16, and "
            "gdn2gen knows no cure for this version: use float32 or float16, or a GPU"
        )


@cache
def _is_taught() -> bool:
    if _is_right():
        return True
    try:
        _teach()
    except (ImportError, AttributeError):
        return False
    return _is_right()


@triton.jit  # type: ignore[untyped-decorator]
def _sample(x, y, z, S: tl.constexpr):  # type: ignore[no-untyped-def]
    o_xy = tl.arange(0, S)[:, None] * S + tl.arange(0, S)[None, :]
    b_x, b_y = tl.load(x + o_xy), tl.load(y + o_xy)
    b_z = tl.dot(b_x * b_y, tl.trans(-b_y)) + tl.dot(b_x - b_y, b_x + b_y)
    tl.store(z + o_xy, (b_z / 3.0).to(tl.bfloat16))


def _is_right() -> bool:
    """Whether one sample of what the kernels do in bf16 comes out as torch has it."""
    x = torch.arange(_SIZE * _SIZE, dtype=torch.float32).view(_SIZE, _SIZE).cos().bfloat16()
    y, z = x.flip(0, 1), torch.empty_like(x)
    try:
        _sample[(1,)](x, y, z, S=_SIZE)
    except Exception:
        return False
    products = (x * y).float() @ -y.float().T + (x - y).float() @ (x + y).float()
    return torch.allclose(z.float(), (products / 3.0).bfloat16().float(), rtol=2.0**-7)


def _teach() -> None:
    """Replace what the interpreter's builder does with tiles of bf16."""
    import numpy as np
    from triton.runtime import interpreter

    Builder: Any = interpreter.InterpreterBuilder
    Handle: Any = interpreter.TensorHandle

    def is_bf16(x: Any) -> bool:
        return bool(x.dtype.scalar == tl.bfloat16)

    def to_fp32(x: Any) -> Any:
        return (x.data.astype(np.uint32) << 16).view(np.float32)

    def to_bits(values: Any) -> Any:
        """fp32 to the bits of bf16, to the nearest, ties to even; NaN stays NaN."""
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        nearest = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)

    def elementwise(operation: Callable[..., Any], otherwise: Callable[..., Any]) -> Any:
        def taught(builder: Any, *operands: Any) -> Any:
            if not is_bf16(operands[0]):
                return otherwise(builder, *operands)
            return Handle(to_bits(operation(*map(to_fp32, operands))), tl.bfloat16)

        return taught

    def dot(otherwise: Callable[..., Any]) -> Any:
        def taught(builder: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
            if not is_bf16(a):
                return otherwise(builder, a, b, accumulator, *options)
            product = np.matmul(to_fp32(a), to_fp32(b), dtype=np.float32)
            return Handle(product + accumulator.data, accumulator.dtype.scalar)

        return taught

    def truncate(otherwise: Callable[..., Any]) -> Any:
        def taught(builder: Any, x: Any, to: Any) -> Any:
            if to.scalar == tl.bfloat16 and x.dtype.scalar == tl.float32:
                return Handle(to_bits(x.data), tl.bfloat16)
            return otherwise(builder, x, to)

        return taught

    operations: dict[str, Callable[..., Any]] = {
        "create_fadd": np.add,
        "create_fsub": np.subtract,
        "create_fmul": np.multiply,
        "create_fneg": np.negative,  # Triton 3.6 negates by subtracting
    }
    better = {"create_dot": dot(Builder.create_dot)}
    better["create_fp_trunc"] = truncate(Builder.create_fp_trunc)
    for name, operation in operations.items():
        if hasattr(Builder, name):
            better[name] = elementwise(operation, getattr(Builder, name))
    for name, method in better.items():
        setattr(Builder, name, method)
