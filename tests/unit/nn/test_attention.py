"""Attention over a window: rotary positions, and what goes to kernels that take windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gdn2gen.nn import SlidingWindowAttention, _rotary, _windowed
from gdn2gen.nn._windowed import attended, attended_within, window_mask


def _qkv(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]


def test_turned_and_its_gradients() -> None:
    """As the formula by autograd, twice; turned by the negative angle it is what it was."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = _rotary.cosines_and_sines(torch.arange(5)[None] + 3, 8, 10.0)
    assert cos.dtype == torch.float32
    cos, sin = cos.double(), sin.double()
    torch.testing.assert_close(_rotary.turned(x, cos, sin), _rotary._formula(x, cos, sin))
    torch.testing.assert_close(_rotary.turned(_rotary.turned(x, cos, sin), cos, -sin), x)
    assert torch.autograd.gradcheck(lambda y: _rotary.turned(y, cos, sin), x)
    assert torch.autograd.gradgradcheck(lambda y: _rotary.turned(y, cos, sin).square(), x)


def test_turned_is_rounded_once() -> None:
    """In fp32 within, as the formula; gradients likewise, and of views."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 4, 16).bfloat16()[:, :, :3].requires_grad_()
    cos, sin = _rotary.cosines_and_sines(torch.arange(7)[None], 16, 10000.0)
    found, wanted = _rotary.turned(x, cos, sin), _rotary._formula(x, cos, sin)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.008, atol=1e-6)
    assert (found == wanted).float().mean() > 0.99  # but for fused multiply-adds
    dy = torch.randn_like(wanted)
    into = [torch.autograd.grad(y, x, dy)[0] for y in (found, wanted)]
    torch.testing.assert_close(into[0], into[1], rtol=0.008, atol=0.01)


def _by_kernels(
    monkeypatch: pytest.MonkeyPatch, T: int, window: int
) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
    """Calls of torch's kernels for packed sequences, stood in for; o by them and with a mask."""
    calls: list[dict[str, Any]] = []

    def varlen(q: Tensor, k: Tensor, v: Tensor, *ends: Any, window_size: tuple[int, int]) -> Tensor:
        calls.append({"ends": ends[0].tolist(), "most": ends[2:], "window": window_size})
        assert torch.equal(ends[0], ends[1]) and ends[0].dtype == torch.int32
        parts = []
        for begin, end in zip(ends[0][:-1], ends[0][1:], strict=True):
            of = torch.arange(end - begin)
            back = of[:, None] - of
            seen = (back <= window_size[0]) & (back >= -window_size[1])
            parts.append(attended(*(x[None, begin:end] for x in (q, k, v)), seen)[0])
        return torch.cat(parts)

    q, k, v = _qkv(3, T, 2, 8)
    wanted = attended(q, k, v, window_mask(T, window, q.device))
    monkeypatch.setattr(_windowed, "varlen_attn", varlen)
    monkeypatch.setattr(_windowed, "_takes_windows", lambda q: True)
    return calls, attended_within(q, k, v, window), wanted


@pytest.mark.parametrize("window", [1, 4, 8])
def test_windows_of_rows_are_those_of_packed_sequences(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, found, wanted = _by_kernels(monkeypatch, 9, window)
    torch.testing.assert_close(found, wanted)
    assert calls == [{"ends": [0, 9, 18, 27], "most": (9, 9), "window": (window - 1, 0)}]


def test_no_window_where_all_are_within(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, found, wanted = _by_kernels(monkeypatch, 9, 9)
    torch.testing.assert_close(found, wanted)
    assert calls == []


def test_a_mask_where_kernels_take_none() -> None:
    """On the CPU: in any dtype, differentiable."""
    q, k, v = _qkv(2, 6, 2, 4, dtype=torch.float64)
    assert not _windowed._takes_windows(q)
    assert torch.autograd.gradcheck(lambda *x: attended_within(*x, 3), (q, k, v))


def test_a_token_is_turned_as_many_are() -> None:
    """Its q and k side by side, and by rates that are known."""
    torch.manual_seed(0)
    layer, x = SlidingWindowAttention(16, num_heads=2, window=4), torch.randn(2, 1, 16)
    two = torch.cat((x, x), 1)
    torch.testing.assert_close(layer(two)[:, :1], layer(x))
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
