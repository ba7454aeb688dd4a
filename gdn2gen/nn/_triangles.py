"""Attention over a window as causal attention of blocks, for kernels that know no windows."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.base.environment import is_batch_invariant, is_off, values_of
from gdn2gen.runtime.arguments import is_watched

SWITCH: Final = "GDN2GEN_WINDOW_TRIANGLES"
_MOST: Final = 128
"""Channels of a head that cuDNN's backward takes on every GPU that it has one for."""
_ATEN: Final[Any] = torch.ops.aten


def wanted(q: Tensor, k: Tensor, v: Tensor, window: int) -> bool:
    """Whether windows of q, k and v [B, T, heads, D] are to go this way, and can."""
    if is_off(values_of((SWITCH,))[0]) or torch.compiler.is_compiling():
        return False
    if window < 2 or q.shape[1] % window or q.shape[-1] % 8 or q.shape[-1] > _MOST:
        return False
    # sums of a backward come in no fixed order
    if is_batch_invariant() or is_watched((q, k, v)):
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    # of cuDNN there are two products at once from sm_90 on
    return bool(q.is_cuda and torch.cuda.get_device_capability(q.device)[0] >= 9)


def attended_by_triangles(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """o [B, T, heads, D], where each token sees itself and the `window` - 1 tokens before it, and T
    is two or more windows.

    In blocks of `window` tokens, what a token sees is a triangle of its own block, s <= t, and the
    one that is missing in the block before, s > t within blocks. The latter is causal, too, if
    both are read from their ends: then no kernel needs to know of windows, and no pair is computed
    that the window masks but for tiles on diagonals. Two softmaxes of parts make one by the logs of
    their sums; gradients of parts are those of kernels that are given the sums of all.
    """
    o: Tensor = _Triangles.apply(q, k, v, window)  # type: ignore[no-untyped-call]
    return o


class _Triangles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        shape, ctx.window = q.shape, window
        q, k, v = (_blocks(x, window) for x in (q, k, v))
        count = q.shape[1]
        o, log, near = _causal(*(x.flatten(0, 1) for x in (q, k, v)))
        o_far, log_far, far = _causal(*_far(q, k, v))
        o, logs, log_far = _of(count, o), _of(count, log), _of(count - 1, log_far)
        ctx.near, ctx.far = near[1], far[1]
        # its last row is the token that sees nothing of the block before
        of_part = log_far[..., :-1, :].flip(-2)
        of_own = logs[:, 1:, :, :-1]
        total = torch.logaddexp(of_own, of_part)
        own = (of_own - total).exp_().transpose(2, 3)
        part = (of_part - total).exp_().transpose(2, 3)
        into = o[:, 1:, :-1]
        further = _of(count - 1, o_far)[:, :, :-1].flip(2)
        into.copy_(torch.addcmul(own * into, part, further))
        of_own.copy_(total)
        # it has sums of its own, for those of all may be anything beside its pairs
        logs_far = torch.cat((total.flip(-2), log_far[..., -1:, :]), -2)
        ctx.save_for_backward(q, k, v, o, logs, logs_far, *near[0], *far[0])
        y: Tensor = o.reshape(shape)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, o, logs, logs_far, *rest = ctx.saved_tensors
        shape, do = do.shape, _blocks(do, ctx.window)
        ends = len(rest) // 2
        given = [x.flatten(0, 1) for x in (do, q, k, v, o)]
        near = _causal_backward(*given, log=logs.flatten(0, 1), rest=(rest[:ends], ctx.near))
        do_far, o_far = (_turned_queries(x) for x in (do, o))
        do_far[:, -1] = 0
        given = [do_far, *_far(q, k, v), o_far]
        far = _causal_backward(*given, log=logs_far.flatten(0, 1), rest=(rest[ends:], ctx.far))
        count = q.shape[1]
        dq, dk, dv = (_of(count, x) for x in near)
        dq_far, dk_far, dv_far = (_of(count - 1, x) for x in far)
        dq[:, 1:, :-1] += dq_far[:, :, :-1].flip(2)
        dk[:, :-1] += dk_far.flip(2)
        dv[:, :-1] += dv_far.flip(2)
        return dq.reshape(shape), dk.reshape(shape), dv.reshape(shape), None


def _blocks(x: Tensor, window: int) -> Tensor:
    """[B, T, heads, D] as [B, blocks, window, heads, D]."""
    return x.contiguous().view(x.shape[0], -1, window, *x.shape[2:])


def _of(count: int, x: Tensor) -> Tensor:
    """So many blocks of each sequence, [B * blocks, ..] as [B, blocks, ..]."""
    return x.reshape(-1, count, *x.shape[1:])


def _far(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of all blocks but the first, and keys and values before them, so that what a row may
    see is causal: row r is query window - 2 - r, and row s key window - 1 - s."""
    k, v = (x[:, :-1].flip(2).flatten(0, 1) for x in (k, v))
    return _turned_queries(q), k, v


def _turned_queries(x: Tensor) -> Tensor:
    """From the last but one to the first; the last, which has no key to see, at the end."""
    return torch.cat((x[:, 1:, :-1].flip(2), x[:, 1:, -1:]), 2).flatten(0, 1)


_Rest = tuple[list[Tensor], tuple[Any, ...]]
"""What a backward takes beside all else: tensors, and others."""


def _causal(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, _Rest]:
    """o and logs of sums [N, heads, T, 1], causal; all else [N, T, heads, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not q.is_cuda:
        o, log = _ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        return o.transpose(1, 2), log[..., None], ([], ())
    found = _ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)
    o, log, _, _, longest, of_keys, seed, offset, _ = found
    log = log if log.dim() == 4 else log[..., None]
    return o.transpose(1, 2), log, ([seed, offset], (longest, of_keys))


def _causal_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, *, log: Tensor, rest: _Rest
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v [N, T, heads, D] of pairs whose softmax has those sums, and o."""
    do, q, k, v, o = (x.transpose(1, 2) for x in (do, q, k, v, o))
    if not q.is_cuda:
        found = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, log[..., 0], 0.0, True
        )
    else:
        (seed, offset), (longest, of_keys) = rest
        found = _ATEN._scaled_dot_product_cudnn_attention_backward(
            do, q, k, v, o, log.contiguous(), seed, offset, None, None, None,
            longest, of_keys, 0.0, True,
        )  # fmt: skip
    dq, dk, dv = (x.transpose(1, 2) for x in found)
    return dq, dk, dv
