"""A kernel in Triton's interpreter as it is, and hastened: `python interpreter_checks.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from gdn2gen.codegen.hasten import hasten
from gdn2gen.codegen.interpreter import mend_loops

N = 16


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


def run() -> list[torch.Tensor]:
    x = torch.arange(2.0 * N * N).cos()
    n = (x * 2**30).int()
    floats, ints = torch.empty_like(x), torch.empty_like(n)
    kernel[(2,)](x, n, floats, ints, 2 * N * N - 5, N=N)
    return [floats, ints]


def main() -> None:
    mend_loops()
    plain, before = run(), interpreter._get_np_dtype
    hasten()
    assert interpreter._get_np_dtype is not before, f"not for Triton {triton.__version__}"
    for x, y in zip(plain, run(), strict=True):
        assert x.unique().numel() > N and torch.equal(x, y)


if __name__ == "__main__":
    main()
