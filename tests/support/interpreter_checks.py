"""Kernels in Triton's interpreter as it is, and hastened: `python interpreter_checks.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from gdn2gen.codegen.hasten import hasten
from gdn2gen.codegen.interpreter import mend_loops

N = 16
PROGRAMS = 3


@triton.jit
def larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def flipped(x, N: tl.constexpr):
    return tl.flip(x, 0) + tl.sum(tl.reshape(x, [N, N]), 1, keep_dims=True)


@triton.jit
def kernel(x, n, floats, ints, T, N: tl.constexpr):
    o_i, o_j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    o = o_i * N + o_j + tl.program_id(0) * N * N
    b_x, b_n = tl.load(x + o, mask=o < T, other=0.5), tl.load(n + o, mask=o < T, other=3)
    b_y = tl.dot(b_x, flipped(b_x, N)) + tl.cumsum(b_x, 0, reverse=True) - tl.min(b_x)
    for i in range(0, T, N * N):
        b_y += tl.where(o_i > i, b_y.to(tl.float16).to(tl.float32), tl.exp2(b_x))
    tl.store(floats + o, b_y)
    b_n = b_n * 2_000_000_011 + tl.associative_scan(b_n, 0, larger)  # beyond 32 bits
    b_n ^= tl.xor_sum(b_n, 1, keep_dims=True) + tl.xor_sum(b_n, 0)[None, :]
    tl.store(ints + o, b_n - tl.xor_sum(tl.xor_sum(b_n, 1), 0))


@triton.jit
def kernel_of_shortcuts(x, n, floats, ints, T, N: tl.constexpr, H: tl.constexpr):
    """What shortcuts are for, with numbers that differ from call to call."""
    i_p = tl.program_id(0)
    o_i, o_j = tl.arange(0, N), tl.arange(0, N)
    o = i_p * N * N + o_i[:, None] * N + o_j[None, :]
    there = (o_i[:, None] < N - i_p) & (o_j[None, :] >= i_p)
    b_x = tl.load(x + o, mask=there, other=0.0)
    b_row, b_one = tl.load(x + i_p * N + o_j), tl.load(x + (T - 1) // (i_p + 1) % 7)
    b_h, b_d = b_x.to(H), b_x.to(tl.float64)
    # a tile, and then one that lies the other way, with a number and a scalar: the order of sums
    b_t = tl.trans(b_x)
    b_x += tl.sum(b_x * 0.1 + b_one, 0)[None, :] + tl.where(b_x > b_one, b_x, -1.0)
    b_y = tl.sum(b_t * 0.1 + b_one, 0)[None, :] + tl.sum(b_t + b_row[:, None], 1)[:, None]
    b_y += tl.where(b_t > b_one, b_t, -1.0) + tl.where(there, 0.5, b_t) + tl.where(b_t < 0, 1, 2)
    b_y += tl.dot(b_t, b_x + 1, b_y) + tl.dot(b_h, tl.trans(b_h * 2))
    b_y += tl.dot(b_x, b_t, input_precision="ieee")
    b_y += b_h + b_row + (b_d / 3).to(tl.float32) + b_one / b_row[:, None] + 1 / (2 + i_p)
    for i in tl.static_range(3):
        big = 2_000_000_000  # of 32 bits, as all that is assigned
        b_y += (big + big).to(tl.float32) / big
        b_y = b_y * (i + 0.3) - i + (o_i[:, None] - 5) * i / 7 + tl.exp(b_y * 0.0) + 1.0e-40
    tl.store(floats + o, b_y, mask=there)
    tl.store(floats + o + 1 - 1, 2.0 * b_h, mask=o_j[None, :] == i_p)
    # numbers that are whole, negative and beyond 32 bits; steps back
    p_n = n + o + T
    b_n = o // 3 + (o - 99) // 3 - (3 - o_i[:, None].to(tl.int64))
    b_n += tl.load(p_n - T) // 3 + tl.load(p_n + (0 - T)) % 5
    b_n = (b_n << 2) + (b_n >> 1) + (7 - i_p) + (b_n & 12) + (b_n | i_p) + (there == (b_n != 2))
    b_n += there + (there & there) + (o_i[:, None] <= 4) * 2 + 8 // (i_p + 3)
    b_n += (o_i[:, None] <= 4) * 5_000_000_000
    tl.store(ints + o, b_n - tl.load(n + i_p))


def run() -> list[torch.Tensor]:
    x = torch.arange(1.0 * PROGRAMS * N * N).cos()
    n = (x * 2**30).int()
    made = []
    floats, ints = torch.empty_like(x), torch.empty_like(n)
    kernel[(PROGRAMS,)](x, n, floats, ints, PROGRAMS * N * N - 5, N=N)
    made += [floats, ints]
    for dtype in (tl.float16, tl.float32):
        floats, ints = torch.zeros_like(x), torch.zeros_like(n, dtype=torch.int64)
        kernel_of_shortcuts[(PROGRAMS,)](x, n, floats, ints, x.numel(), N=N, H=dtype)
        made += [floats, ints]
    return made


def main() -> None:
    mend_loops()
    plain, before = run(), interpreter._get_np_dtype
    hasten()
    interpreter.InterpretedFunction.rewritten_fn.clear()  # as in a process where nothing ran yet
    assert interpreter._get_np_dtype is not before, f"not for Triton {triton.__version__}"
    for _ in range(2):
        for x, y in zip(plain, run(), strict=True):
            assert x.unique().numel() > N and torch.equal(x, y)


if __name__ == "__main__":
    main()
