"""Softmax attention over a window, by the fastest of torch's kernels that apply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from gdn2gen.family.parts import HEAD_SIZES
from gdn2gen.nn import _triangles
from gdn2gen.runtime.arguments import by_kernels, is_watched
from gdn2gen.runtime.dtypes import DTYPE_NAME

_FLASH_DTYPES: Final = (torch.float16, torch.bfloat16)
_FLASH_MOST: Final = 256
"""Channels of a head."""


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """o [B, T, heads, D] of q, k and v [B, T, heads, D]; causal where there is no mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
    return o.transpose(1, 2)


def attended_within(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The same where each token sees itself and the `window` - 1 tokens before it.

    With a mask torch computes all T^2 pairs, and not by its fastest kernels. The flash kernels take
    the window, and pass over blocks outside: torch has that of packed sequences, of which rows are
    a case.
    """
    B, T, heads, dim = q.shape
    if window >= T:
        return attended(q, k, v, None)
    if not _takes_windows(q):
        return attended(q, k, v, window_mask(T, window, q.device))
    if _triangles.wanted(q, k, v, window):
        return _triangles.attended_by_triangles(q, k, v, window)
    ends = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
    q, k, v = (x.reshape(B * T, heads, dim) for x in (q, k, v))
    return _varlen(q, k, v, ends, T, window).view(B, T, heads, dim)


def _varlen(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, window: int) -> Tensor:
    """The same of packed sequences [tokens, heads, D], by torch's flash kernels."""
    # not above: it brings torch's compiler along, which takes seconds
    from torch.nn.attention.varlen import varlen_attn

    o = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(window - 1, 0))
    assert isinstance(o, Tensor)
    return o


def window_mask(tokens: int, window: int, device: torch.device, earlier: int = 0) -> Tensor:
    """[tokens, earlier + tokens]: which keys, of which so many come before the first query, are
    within the window of each query."""
    to = torch.arange(earlier, earlier + tokens, device=device)[:, None]
    of = torch.arange(earlier + tokens, device=device)
    return (of <= to) & (of > to - window)


def steps_by_kernel(q: Tensor, k: Tensor, v: Tensor, kept: Mapping[str, Tensor]) -> bool:
    """Whether one token goes to our kernel, which turns it, keeps it, and attends."""
    rings = kept["k"], kept["v"]
    if not by_kernels(q.device) or q.shape[-1] not in HEAD_SIZES or q.dtype not in DTYPE_NAME:
        return False
    if is_watched((q, k, v, *rings, kept["seen"])):
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    alike = all(x.dtype == q.dtype and x.device == q.device for x in (k, v, *rings))
    in_place = all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (*rings, kept["seen"]))
    return alike and in_place and kept["seen"].dtype == torch.int64


def _takes_windows(q: Tensor) -> bool:
    """Whether flash kernels serve such tensors, and are wanted. They have one derivative."""
    if not q.is_cuda or q.dtype not in _FLASH_DTYPES:
        return False
    if q.shape[-1] % 8 or q.shape[-1] > _FLASH_MOST:
        return False
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return False
    if torch.compiler.is_compiling():  # which cannot ask
        return True
    cuda: Any = torch.backends.cuda  # untyped in torch
    return bool(cuda.is_flash_attention_available() and cuda.flash_sdp_enabled())
