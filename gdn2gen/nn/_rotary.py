"""Rotary positions: q and k turned in pairs (i, i + D/2) by position * base^(-2i/D)."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.runtime.arguments import is_watched


def cosines_and_sines(at: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, 1, dim/2] of positions `at` [B, T], in fp32."""
    angles = at[..., None, None] * _rates(dim // 2, base, at)
    return angles.cos(), angles.sin()


_KNOWN: Final[dict[tuple[Any, ...], Tensor]] = {}


def _rates(half: int, base: float, at: Tensor) -> Tensor:
    """base^(-i / half), made once: five launches of a token's few hundred."""
    if is_watched((at,)):
        return _made(half, base, at.device)
    # tensors of inference mode are its own
    key = half, base, at.device, torch.is_inference_mode_enabled()
    found = _KNOWN.get(key)
    if found is None:
        found = _made(half, base, at.device)
        # what a capture makes is the graph's alone
        if not (at.is_cuda and torch.cuda.is_current_stream_capturing()):
            _KNOWN[key] = found
    return found


def _made(half: int, base: float, device: torch.device) -> Tensor:
    return base ** (-torch.arange(half, device=device, dtype=torch.float32) / half)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, heads, D], its pairs turned; computed in fp32 at least, and like x.

    As a function of its own, for autograd would keep, add up and pad what is half a tensor in fp32
    (of q and k of 4 x 4096 tokens of 2048 channels 8 GB of traffic where these four are 0.9).
    """
    if is_watched((x, cos, sin)) or torch.autograd.forward_ad._current_level >= 0:
        return _formula(x, cos, sin)
    y: Tensor = _Turned.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


def _formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        half = x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        # sums in fp32, which are rounded where they are written
        torch.addcmul(a * cos, b, sin, value=-1, out=y[..., :half])
        torch.addcmul(b * cos, a, sin, out=y[..., half:])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """Turned back; itself a function that autograd knows."""
        cos, sin = ctx.saved_tensors
        return turned(dy, cos, -sin), None, None
